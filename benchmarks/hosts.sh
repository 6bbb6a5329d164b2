#!/usr/bin/env bash
# Shows that EchoHandler can replace Tornado's WebSocketHandler: runs the tests of other projects
# with EchoHandler as the base of their handlers. Usage: hosts.sh [--install] [SUITE ...]
#
# A test that fails is run again with Tornado's own class ("stock"), since some fail in any case,
# for instance without a network. If it passes there, it is run again by itself, since some depend
# on chance. The exit code is 1 if a test fails with EchoHandler only and is not listed below. The
# script needs PyPI, about ten minutes, and a machine that does nothing else. In HOSTS_DIR, if that
# is set, it keeps what it has installed for the next time. With --install, it only installs.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${HOSTS_DIR:-}" ]; then
  mkdir -p "$HOSTS_DIR"
  work=$(cd "$HOSTS_DIR" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
only_install=0
if [ "${1:-}" = --install ]; then
  only_install=1
  shift
fi
[ $# -gt 0 ] || set -- tornado-6.6 tornado-6.5 terminado jupyter_server
export PIP_RETRIES=10 PIP_DISABLE_PIP_VERSION_CHECK=1
pytest=pytest==9.2.0
tornado=6.6.1

# The tests that may fail with EchoHandler, and why.
allowed=(
  # A GET that is not a handshake gets 426 Upgrade Required (RFC 9110 section 15.5.22), not 400.
  tornado/test/websocket_test.py::WebSocketTest::test_http_request
  # It expects a message of 28 bytes to be compressed. Below 1 KiB that does not pay, so we do not.
  tornado/test/websocket_test.py::DefaultCompressionTest::test_message_sizes
  # It replaces _write_frame, a private method of Tornado's protocol, which ours does not have.
  tornado/test/websocket_test.py::FloodTest::test_pong_most_recent_ping
  # It expects that other callbacks run more than ten times while 5,000 messages are handled. We let
  # them run every 2 ms, which is less often on a fast machine.
  tornado/test/websocket_test.py::FloodTest::test_many_small_messages_yield
)

# install NAME REQUIREMENT ...: makes a virtual environment, unless it exists.
install() {
  local env=$work/$1
  shift
  [ -e "$env/installed" ] && return
  rm -rf "$env"
  python3 -m venv "$env"
  "$env/bin/pip" install -q --no-compile "$@"
  touch "$env/installed"
}

# unpack NAME VERSION: fetches the source distribution, since wheels come without their tests.
unpack() {
  [ -e "$work/$1-$2/pyproject.toml" ] && return
  "$work/$1/bin/pip" download -q --no-deps --no-binary "$1" -d "$work" "$1==$2"
  tar -xzf "$work/$1-$2.tar.gz" -C "$work"
}

# try WHOSE NAME DIRECTORY ARGUMENT ...: runs pytest in that directory, with EchoHandler if WHOSE is
# "ours" and with Tornado's class if it is "stock". Returns 1 if a test has failed; pytest notes in
# its cache which. The home directory is not the caller's, since the shells that terminado starts
# write their history there.
try() {
  local whose=$1 name=$2 folder=$3 status=0
  shift 3
  mkdir -p "$work/home"
  (
    cd "$folder" || exit
    [ "$whose" = ours ] || export WS_ECHO_STOCK=1
    export PYTHONPATH=$project:$project/benchmarks PYTHONDONTWRITEBYTECODE=1
    export PATH=$work/$name/bin:$PATH HOME=$work/home
    pytest -p hosts_plugin -o cache_dir="$work/$name/cache" --rootdir=. --color=no --tb=short \
      --no-showlocals --show-capture=no "$@"
  ) >"$work/$name/$whose.log" 2>&1 </dev/null || status=$?
  [ $status -le 1 ] || { tail -n 30 "$work/$name/$whose.log"; exit 1; }
  return $status
}

# failed NAME: prints the tests that have failed according to pytest's cache.
failed() {
  sed -n 's/^ *"\(.*\)": true,\{0,1\}$/\1/p' "$work/$1/cache/v/cache/lastfailed" 2>/dev/null || true
}

# again TEST NAME DIRECTORY ARGUMENT ...: runs a test by itself, on ours and on stock in turns,
# until it passes on ours or fails on stock, and prints which. Returns 1 if neither happens in five
# rounds, which has a probability of 1 in 1,000 if the test fails every other time on both.
again() {
  local test=$1 _
  shift
  for _ in 1 2 3 4 5; do
    if WS_ECHO_ALONE=1 try ours "$@" "$test"; then
      echo "passed at another try: $test"
      later=$((later + 1))
      return
    fi
    if ! try stock "$@" "$test"; then
      echo "fails on stock as well: $test"
      both=$((both + 1))
      return
    fi
  done
  return 1
}

# compare NAME VERSION DIRECTORY FILE ARGUMENT ...: runs the suite on ours, and then on stock what
# has failed. FILE contains the tests; if it is "", pytest finds them.
compare() {
  local name=$1 version=$2 folder=$3 files=$4 log=$work/$1/ours.log
  local test ours stock="" may=0 both=0 later=0 number=0 passed
  shift 4
  [ $only_install = 0 ] || return 0
  echo "== $name $version"
  rm -rf "$work/$name/cache"
  try ours "$name" "$folder" ${files:+"$files"} "$@" || true
  ours=$(failed "$name")
  grep '^WebSockets served' "$log"
  tail -n 1 "$log"
  passed=$(tail -n 1 "$log" | grep -oE '[0-9]+ passed' || echo 0)
  if [ -n "$ours" ]; then
    try stock "$name" "$folder" ${files:+"$files"} "$@" --last-failed || true
    stock=$(failed "$name")
  fi
  while read -r test; do
    [ -n "$test" ] || continue
    number=$((number + 1))
    if grep -qxF -e "$test" <<<"$stock"; then
      both=$((both + 1))
      echo "fails on stock as well: $test"
    elif printf '%s\n' "${allowed[@]}" | grep -qxF -e "$test"; then
      may=$((may + 1))
    elif ! again "$test" "$name" "$folder" "$@"; then
      wrong=1
      echo "FAILS ON OURS ALONE: $test"
      sed -n '/^=* \(ERRORS\|FAILURES\) =*$/,/^=* short test summary/p' "$log"
    fi
  done <<<"$ours"
  echo "$name $version: $((${passed% *} + later)) passed, $((number - later)) failed of which" \
    "$may allowed, $both on stock as well"
}

# tornado NAME VERSION: the wheel contains the tests. Warnings are errors, as for Tornado's own
# runner, except for pytest's, which takes a handler called TestWebSocketHandler for a test.
tornado() {
  install "$1" "tornado==$2" "$pytest"
  compare "$1" "$2" "$work/$1"/lib/python3*/site-packages tornado/test/websocket_test.py \
    -W error -W ignore::pytest.PytestCollectionWarning
}

# terminado: its tests turn warnings into errors, but leave some of their own clients open.
terminado() {
  install terminado terminado==0.18.1 pytest-timeout "tornado==$tornado" "$pytest"
  unpack terminado 0.18.1
  compare terminado 0.18.1 "$work/terminado-0.18.1" "" \
    -W 'ignore:Unclosed WebSocketClientConnection:ResourceWarning'
}

# jupyter_server: its tests turn warnings into errors, but call what Tornado has since deprecated.
# The timeout method that they set would make a test that hangs end pytest rather than fail.
jupyter_server() {
  install jupyter_server 'jupyter_server[test]==2.21.1' "tornado==$tornado" "$pytest"
  unpack jupyter_server 2.21.1
  # As root, which is usual in a container, it starts only if its configuration allows that.
  mkdir -p "$work/jupyter_server/etc/jupyter"
  echo '{"ServerApp": {"allow_root": true}}' \
    >"$work/jupyter_server/etc/jupyter/jupyter_server_config.json"
  compare jupyter_server 2.21.1 "$work/jupyter_server-2.21.1" "" \
    -W ignore::DeprecationWarning --timeout-method=signal
}

wrong=0
for suite; do
  case $suite in
    tornado-6.6) tornado tornado-6.6 "$tornado" ;;
    tornado-6.5) tornado tornado-6.5 6.5.10 ;;
    terminado) terminado ;;
    jupyter_server) jupyter_server ;;
    *) echo "hosts.sh: no such suite: $suite" >&2; exit 2 ;;
  esac
done
exit $wrong
