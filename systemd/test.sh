#!/bin/bash
# Tests what the units promise. For each claim, it prints a line with "ok" or "FAIL" and what it has
# seen. The exit code is 1 if there is a FAIL, and 77 if the script cannot run. It needs root, a
# booted systemd, x86-64, and ws-echo installed as the README says. Use a machine or container that
# can be thrown away: it breaks the configuration, kills the service, and restarts it often.
set -u
APP_DIR=${APP_DIR:-/opt/ws-echo} ETC_DIR=${ETC_DIR:-/etc/ws-echo}
PYTHON=$APP_DIR/venv/bin/python3 CONFIG=$ETC_DIR/ws-echo.toml UNITS=/run/systemd/system
UNIT=ws-echo.service SOCKET=ws-echo.socket URL=ws://localhost:4000/ SECURE=wss://localhost:4000/
DROPIN=$UNITS/$UNIT.d SOCKET_DROPIN=$UNITS/$SOCKET.d
if [ "$(id -u) $(uname -m)" != "0 x86_64" ] || [ ! -d /run/systemd/system ] || [ ! -x "$PYTHON" ] ||
    ! systemctl cat $UNIT $SOCKET > /dev/null; then
    echo "this needs root, x86-64, a booted systemd and ws-echo installed" >&2
    exit 77
fi
failed=0 work=$(mktemp -d /var/tmp/ws-echo.XXXXXX)
chmod 755 "$work"
cp -p "$CONFIG" "$work/toml"

tidy() {
    jobs -p | xargs -r kill 2>/dev/null
    systemctl stop {ws-echo,ws-echo-test,'ws-echo@*'}.{socket,service} 2>/dev/null
    cat "$work/toml" > "$CONFIG"
    rm -rf "$work" "$DROPIN" "$SOCKET_DROPIN" "$ETC_DIR"/{tls,ws-echo-test.toml,probe.py} \
        $UNITS/{ws-echo-test,ws-echo@}.{socket,service} {/dev,/tmp}/ws-echo-probe \
        /run/ws-echo-test.sock
    systemctl daemon-reload
    systemctl reset-failed $UNIT $SOCKET 2>/dev/null
}
trap tidy EXIT

# check TEXT FIGURE COMMAND ...: prints a claim, which holds if the command succeeds.
check() {
    local text=$1 figure=$2
    shift 2
    local result="ok  "
    "$@" > /dev/null || { result=FAIL && failed=1; }
    echo "$result $text: $figure"
}
# until_true SECONDS COMMAND ...: waits until the command succeeds.
until_true() {
    local end=$((${EPOCHREALTIME/./} + $1 * 1000000))
    shift
    until "$@" > /dev/null 2>&1; do [ "${EPOCHREALTIME/./}" -lt $end ] || return 1; sleep 0.05; done
}
show() { systemctl show -P "$1" "${2:-$UNIT}"; }
matches() { [[ $1 =~ $2 ]]; }
status_is() { matches "$(show StatusText)" "$1"; }
# Between two processes, MainPID is 0, and kill 0 would end this script.
kill_main() { local pid; pid=$(show MainPID); [ "$pid" != 0 ] && kill "$1" "$pid"; }
pid_is_not() { [ "$(show MainPID)" != "$1" ] && [ "$(show ActiveState)" = active ]; }
mark() { journalctl --sync; since=@$EPOCHREALTIME; }
# said OPTION ...: the journal since the last mark.
said() { journalctl --sync; journalctl -q --since="$since" -o cat "$@"; }
service_said() { said _SYSTEMD_UNIT=$UNIT "$@"; }
logged() { service_said | grep -qE "$1"; }
client() { "$PYTHON" -W ignore "$work/client.py" "$@"; }
churn_refused_nobody() { ! grep -q failed "$work/churn"; }
# serves PID: whether it is still this process that serves.
serves() {
    [ "$1" != 0 ] && [ "$(show MainPID)" = "$1" ] && [ "$(client echo)" = ECHO:hello ]
}
# in_background ARGUMENT ...: starts a client, and returns when it has printed "open".
in_background() {
    rm -f "$work/go"
    exec {out}< <(client "$@")
    read -r -t 20 _ <&"$out"
}
# outcome: what the client in the background prints at its end.
outcome() { timeout 30 cat <&"$out"; }
# dropin LINES: replaces the drop-in with these lines of [Service].
dropin() {
    mkdir -p "$DROPIN"
    printf '[Service]\n%s\n' "$1" > "$DROPIN/test.conf"
    systemctl daemon-reload
}
# fresh SERVICE-LINES TOML-LINES: starts the service anew with these lines.
fresh() {
    systemctl stop $SOCKET $UNIT 2> /dev/null
    systemctl reset-failed $UNIT $SOCKET 2> /dev/null
    dropin "${1:-}"
    printf '%s\n' "${2:-}" > "$CONFIG"
    mark
    systemctl start $UNIT
}
# milliseconds COMMAND ...: how long the command takes.
milliseconds() {
    local start=${EPOCHREALTIME/./}
    "$@" > /dev/null 2>&1
    echo $(((${EPOCHREALTIME/./} - start) / 1000))
}
# certificate NAME: makes a certificate with this name, and its key.
certificate() {
    mkdir -p "$ETC_DIR/tls"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
        -subj "/CN=$1" -addext subjectAltName=DNS:localhost \
        -keyout "$ETC_DIR/tls/key.pem" -out "$ETC_DIR/tls/cert.pem" 2> /dev/null
    chmod 644 "$ETC_DIR"/tls/*.pem
}
served_name() {
    openssl s_client -connect localhost:4000 < /dev/null 2> /dev/null | sed -n 's/^subject=CN = //p'
}

cat > "$work/client.py" <<'PYTHON'
import asyncio, collections, os, socket, sys, time
from tornado import httpclient, netutil, simple_httpclient, websocket
from tornado.iostream import IOStream

URL = "ws://localhost:4000/"

# A second try, on another address, would hide that the first one was refused.
class OneAddress(netutil.Resolver):
    async def resolve(self, host, port, family=socket.AF_UNSPEC):
        return [(socket.AF_INET, ("127.0.0.1", port))] if host == "localhost" else [
            (socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port))]

def connect(url=URL, **options):
    request = httpclient.HTTPRequest(
        url, validate_cert=False, connect_timeout=20, request_timeout=20, **options)
    return websocket.websocket_connect(request, resolver=OneAddress())

def summary(counter):
    print(", ".join(f"{n} {what}" for what, n in sorted(counter.items())) or "nothing", flush=True)

# Sends a message and prints the reply.
async def echo(url=URL):
    connection = await connect(url)
    await connection.write_message("hello")
    print(await connection.read_message())
    connection.close()

# Holds connections open until the server closes them or, with `then`, until that file exists: then
# each sends a message, and leaves.
async def hold(number, url=URL, then=""):
    connections = [await connect(url) for _ in range(int(number))]
    print("open", flush=True)
    if then:
        while not os.path.exists(then):
            await asyncio.sleep(0.05)
        for connection in connections:
            await connection.write_message("x")
        replies = [await connection.read_message() for connection in connections]
        summary(collections.Counter(replies))
        return
    for connection in connections:
        while await connection.read_message() is not None:
            pass
    summary(collections.Counter(connection.close_code for connection in connections))

# Connects, sends a message, and leaves, again and again.
async def churn(seconds, url=URL):
    seen, longest, end = collections.Counter(), 0, time.monotonic() + float(seconds)
    async def worker():
        nonlocal longest
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                connection = await connect(url)
            except Exception as error:
                seen[f"failed to connect ({str(error) or type(error).__name__})"] += 1
                continue
            longest = max(longest, time.monotonic() - start)
            try:
                await connection.write_message("x")
            except websocket.WebSocketClosedError:
                pass
            reply = await connection.read_message()
            seen["echoed" if reply == "ECHO:x" else f"closed with {connection.close_code}"] += 1
            connection.close()
    await asyncio.gather(*[worker() for _ in range(20)])
    print(f"the longest handshake took {longest * 1000:.0f} ms", end=", ")
    summary(seen)

# Keeps the server as busy as possible: sends messages of 10 bytes without waiting for replies.
async def flood(seconds):
    end, got = time.monotonic() + float(seconds), 0
    async def worker():
        nonlocal got
        reader, writer = await upgrade()
        async def drain():
            nonlocal got
            while data := await reader.read(1 << 18):
                got += len(data) // 17
        reading = asyncio.create_task(drain())
        while time.monotonic() < end:
            writer.write((b"\x81\x8a\0\0\0\0" + b"x" * 10) * 4096)
            await writer.drain()
        reading.cancel()
    await asyncio.gather(*[worker() for _ in range(8)])
    print(got, "replies")

# Does the handshake without a WebSocket library.
async def upgrade():
    reader, writer = await asyncio.open_connection("127.0.0.1", 4000)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n"
                 b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                 b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer

# Never answers the Close.
async def deaf():
    both = await upgrade()
    print("open", flush=True)
    await asyncio.sleep(20)

# Opens as many connections as there is room for, and tries one more.
async def fill(number):
    connections = [await connect() for _ in range(int(number))]
    try:
        await connect()
        print("one more got in")
    except httpclient.HTTPError as error:
        url, client = "http://127.0.0.1:4000/healthz", httpclient.AsyncHTTPClient()
        health = await client.fetch(url, raise_error=False)
        print(f"the next one gets {error.code}, /healthz {health.code}")

# Does something that the server logs as a warning.
async def bad(what):
    if what == "frame":
        connection = await connect()
        connection.protocol.stream.write(b"\xff\xff")
        await connection.read_message()
        print(connection.close_code)
    else:
        try:
            await connect(headers={"Origin": "http://evil.example"})
        except httpclient.HTTPError as error:
            print(error.code)

async def unix(path):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    print((await reader.read()).splitlines()[0].decode())

asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
PYTHON

# ---------------------------------------------------------------------------- 1. Started by systemd
systemctl log-level debug
fresh
check "start: it runs" "$(show ActiveState), $(show SubState)" [ "$(show SubState)" = running ]
reply=$(client echo)
check "start: port 4000 answers" "$reply" [ "$reply" = ECHO:hello ]
seen=$(said -u $UNIT | grep -oE 'SERVER. listening|READY=1|start -> running' | head -3 | paste -sd,)
check "READY=1 comes once it listens" "$seen" \
    [ "$seen" = "SERVER] listening,READY=1,start -> running" ]
in_background hold 12 $URL "$work/go"
until_true 7 status_is "serving 12 connections on "
check "STATUS can be read" "$(show StatusText)" status_is "^serving 12 connections on $URL$"
mark
systemctl reload $UNIT
until_true 3 logged reloaded
check "RELOADING=1, with the time" "$(said -u $UNIT | grep -o 'RELOADING=1[^)]*' | head -1)" \
    matches "$(said -u $UNIT)" "RELOADING=1, MONOTONIC_USEC=[0-9]+"
check "after a reload it runs" "$(show SubState)" until_true 3 [ "$(show SubState)" = running ]
touch "$work/go"
seen=$(outcome)
check "a reload drops nobody" "$seen" [ "$seen" = "12 ECHO:x" ]

fresh "" "drain-timeout = 2"
in_background deaf
mark
systemctl stop --no-block $UNIT $SOCKET
until_true 1 status_is "stopping with 1"
check "STOPPING=1, and STATUS says so" "$(show SubState), $(show StatusText)" \
    matches "$(said -u $UNIT)" "STOPPING=1"
until_true 5 [ "$(show ActiveState)" = inactive ]
systemctl log-level info

fresh $'WatchdogSec=2\nTimeoutAbortSec=1'
pid=$(show MainPID)
cpu=$(show CPUUsageNSec)
seen=$(client flood 8)
cpu=$((($(show CPUUsageNSec) - cpu) / 1000000))
check "a busy loop is left alone by a watchdog of 2 s" "$seen and $cpu ms of CPU in 8 s" \
    [ "$(show MainPID)" = "$pid" ]
kill -STOP "$pid"
took=$(milliseconds until_true 15 pid_is_not "$pid")
check "a loop that hangs is killed and restarted" "after $took ms, $(show NRestarts) restart" \
    [ "$(show NRestarts)" = 1 ]
reply=$(client echo)
check "and then it serves" "$reply" [ "$reply" = ECHO:hello ]
mark
kill_main -ABRT
until_true 3 logged 'File ".*/echo_server.py", line'
seen=$(service_said | grep -m1 -o 'File ".*echo_server.py", line.*')
check "the journal shows where it hung" "$seen" [ -n "$seen" ]

systemctl stop $SOCKET $UNIT
mkdir -p "$SOCKET_DROPIN"
printf '%s\n' '[Socket]' ListenStream= ListenStream=127.0.0.1:4000 'ListenStream=[::1]:4001' \
    ListenStream=/run/ws-echo-test.sock > "$SOCKET_DROPIN/test.conf"
fresh
seen="$(client echo) $(client echo 'ws://[::1]:4001/') $(client unix /run/ws-echo-test.sock)"
check "three inherited sockets" "$seen" [ "$seen" = "ECHO:hello ECHO:hello HTTP/1.1 200 OK" ]
check "STATUS names them" "$(show StatusText)" \
    status_is "on ws://127.0.0.1:4000/, ws://\[::1\]:4001/, ws\+unix:/run/ws-echo-test.sock$"
fresh "" 'unix-socket = "/run/ws-echo-test.sock"'
systemctl stop $SOCKET $UNIT
check "a --unix-socket that does not apply is left alone" "$(show Result)" \
    [ "$(show Result)" = success ]
rm -r "$SOCKET_DROPIN"
systemctl daemon-reload

# -------------------------------------------------------------------------- 2. Start, restart, stop
fresh
in_background hold 100
client churn 6 > "$work/churn" &
churn=$!
sleep 1
for _ in 1 2 3; do systemctl restart $UNIT; sleep 1; done
wait $churn
check "three restarts under load refuse nobody" "$(cat "$work/churn")" churn_refused_nobody
seen=$(outcome)
check "a restart tells every open client 1001" "$seen" [ "$seen" = "100 1001" ]

fresh "" 'log-level = "info"'
in_background hold 5 $URL "$work/go"
pid=$(show MainPID)
echo 'log-level = "debug"' > "$CONFIG"
mark
systemctl reload $UNIT
until_true 3 logged reloaded
reply=$(client echo)
check "reload takes the log level" "$(service_said | grep -m1 Received)" \
    logged '^\[SERVER\] Received:hello'
echo 'log-level = "loud"' > "$CONFIG"
mark
systemctl reload $UNIT
until_true 3 logged error
reply=$(client echo)
check "a broken file changes nothing" "$reply at level debug, process $(show MainPID) as before" \
    eval 'logged "Received:hello" && [ "$(show MainPID)" = '"$pid ]"
seen=$(service_said -p err)
check "and is one line of priority err" "$seen" [ "$(wc -l <<< "$seen")" = 1 -a -n "$seen" ]
touch "$work/go"
seen=$(outcome)
check "all the while its clients stay" "$seen" [ "$seen" = "5 ECHO:x" ]

certificate first
fresh "" "certfile = '$ETC_DIR/tls/cert.pem'
keyfile = '$ETC_DIR/tls/key.pem'"
seen=$(served_name)
in_background hold 3 $SECURE "$work/go"
certificate second
mark
systemctl reload $UNIT
until_true 3 logged reloaded
seen="$seen, then $(served_name)"
check "reload takes a renewed certificate" "$seen" [ "$seen" = "first, then second" ]
echo broken > "$ETC_DIR/tls/cert.pem"
mark
systemctl reload $UNIT
until_true 3 logged error
check "a broken certificate changes nothing" "$(served_name), $(service_said -p err)" \
    [ "$(served_name)" = second ]
touch "$work/go"
seen=$(outcome)
check "and its clients stay" "$seen" [ "$seen" = "3 ECHO:x" ]
rm -r "$ETC_DIR/tls"

fresh "" "drain-timeout = 3"
in_background hold 10
took=$(milliseconds systemctl stop $SOCKET $UNIT)
check "stop is a success, within the drain timeout of 3 s" "$(show Result) in $took ms" \
    [ "$(show Result)" = success -a "$took" -lt 3500 ]
fresh "" "drain-timeout = 3"
in_background deaf
took=$(milliseconds systemctl stop $SOCKET $UNIT)
check "also with a client that does not leave" "$(show Result) in $took ms" \
    [ "$(show Result)" = success -a "$took" -lt 3500 ]

fresh
pid=$(show MainPID)
kill -KILL "$pid"
took=$(milliseconds until_true 10 pid_is_not "$pid")
check "kill -9 is followed by a restart" "$(client echo) after $took ms" pid_is_not "$pid"
until_true 30 eval 'kill_main -KILL; sleep 0.2; [ "$(show ActiveState)" = failed ]'
check "a service that keeps dying is given up" \
    "$(show NRestarts) restarts, $(show Result), socket $(show Result $SOCKET)" \
    [ "$(show ActiveState)" = failed -a "$(show NRestarts)" -le 10 ]
systemctl reset-failed $SOCKET $UNIT
systemctl start $UNIT
check "reset-failed of both, then it starts" "$(client echo)" [ "$(show ActiveState)" = active ]

# fails TEXT STATUS LINE: a start fails with this exit code, and systemctl status shows this line.
fails() {
    local took restarts
    took=$(milliseconds systemctl start $UNIT)
    sleep 1
    restarts=$(show NRestarts)
    check "$1 fails at once" "after $took ms with $(show ExecMainStatus), $restarts restarts" \
        [ "$(show ActiveState)" = failed -a "$(show ExecMainStatus)" = "$2" -a "$restarts" = 0 ]
    check "and systemctl status says why" \
        "$(systemctl status -l --no-pager $UNIT | sed -n 's/.*\(echo_server: .*\)/\1/p')" \
        eval "systemctl status -l --no-pager $UNIT | grep -qF '$3'"
    check "as an error" "$(said -u $UNIT -p err _TRANSPORT=stdout | head -1)" \
        eval "said -u $UNIT -p err | grep -qF '$3'"
}
fresh "" 'colour = "red"' 2> /dev/null
fails "an unknown option" 2 "$CONFIG: colour: there is no such option"
fresh "" 'prefix = ' 2> /dev/null
fails "a file that is not TOML" 2 "$CONFIG: "
fresh "" 'certfile = "/nonexistent.pem"' 2> /dev/null
fails "a missing certificate" 1 "cannot read /nonexistent.pem"

fresh "ExecStart=
ExecStart=$PYTHON -c 'import sys; sys.path[:0] = [\"$APP_DIR\"]; import echo_server; \\
del echo_server.Server; sys.exit(echo_server.main([]))'" 2> /dev/null
until_true 5 eval '[ "$(show NRestarts)" -ge 2 ]'
seen="$(show NRestarts) restarts, $(said -u $UNIT | grep -m1 -o 'status=.*')"
check "a crash is restarted" "$seen" matches "$seen" '^[2-9] restarts, status=70/'
check "and its traceback is an error" "$(service_said -p err | tail -1)" \
    eval 'service_said -p err | grep -q "^ *NameError"'

fresh "" "$(cat "$work/toml")"
client echo > /dev/null
until_true 3 logged 'close\(\)'
check "the shipped configuration shows connections" "$(service_said | grep -m1 'close()')" \
    logged 'connection\(\)'
check "but no messages" "$(service_said | grep -c Received) lines" eval '! logged Received'

fresh
systemctl stop $UNIT 2> /dev/null
reply=$(client echo)
check "the socket alone starts it again" "$reply" [ "$(show ActiveState)" = active ]
systemctl stop $SOCKET $UNIT
check "with both stopped nobody answers" "$(client echo 2>&1 | tail -1)" \
    eval '! client echo 2> /dev/null'
fresh
directory=$(dirname "$(show FragmentPath)")
for kind in socket service; do cp "$directory/ws-echo.$kind" "$UNITS/ws-echo-test.$kind"; done
sed -i 's/^ListenStream=4000/ListenStream=4001/' "$UNITS/ws-echo-test.socket"
echo 'prefix = ""' > "$ETC_DIR/ws-echo-test.toml"
systemctl daemon-reload
systemctl start ws-echo-test
reply="$(client echo), $(client echo ws://localhost:4001/)"
check "a second server is a second pair of units" "$reply" [ "$reply" = "ECHO:hello, hello" ]
systemctl stop ws-echo-test.socket ws-echo-test.service $SOCKET $UNIT

for kind in socket service; do cp "$directory/ws-echo.$kind" "$UNITS/ws-echo@.$kind"; done
echo 'prefix = "one:"' > "$CONFIG"
systemctl daemon-reload
systemctl enable --runtime --now ws-echo@{1..4} 2> /dev/null
in_background hold 60 $URL "$work/go"
# clients: the number of clients of each of the four instances, according to its status.
clients() {
    for n in {1..4}; do show StatusText "ws-echo@$n" | sed 's/[^0-9]*//; s/ .*//'; done | xargs
}
all_have_clients() { matches "$(clients)" '^[1-9][0-9]* [1-9][0-9]* [1-9][0-9]* [1-9][0-9]*$'; }
until_true 12 all_have_clients
check "four instances share a port" "$(clients) connections" all_have_clients
touch "$work/go"
seen=$(outcome)
check "and a configuration" "$seen" [ "$seen" = "60 one:x" ]
echo 'prefix = "ECHO:"' > "$CONFIG"
systemctl restart 'ws-echo@*.service'
in_background hold 60
client churn 4 > "$work/churn" &
churn=$!
sleep 1
systemctl restart ws-echo@2
sleep 1
systemctl restart ws-echo@{1,3,4}
wait $churn
check "their restarts refuse nobody" "$(cat "$work/churn")" churn_refused_nobody
seen=$(outcome)
check "and tell every open client 1001" "$seen" [ "$seen" = "60 1001" ]
seen=$(systemctl is-enabled ws-echo@{1..4}.{socket,service} | sort | uniq -c | xargs)
check "enabling an instance enables its socket" "$seen" [ "$seen" = "8 enabled-runtime" ]
systemctl stop 'ws-echo@*'
check "with all stopped nobody answers" "$(clients) connections" eval '! client echo 2> /dev/null'
systemctl disable --runtime ws-echo@{1..4} 2> /dev/null

# ----------------------------------------------------------------------------------- 3. Locked down
cat > "$ETC_DIR/probe.py" <<'PYTHON'
import ctypes, errno, mmap, os, re, resource, shutil, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)

# Makes a system call by its number on x86-64.
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def line(name, seen, holds):
    print("ok  " if holds else "FAIL", f"{name}: {seen}", flush=True)

# Calls a function that must fail with one of these errors.
def refused(name, what, *codes):
    try:
        line(name, f"no error but {what()!r}", False)
    except (OSError, RuntimeError) as error:
        line(name, error, not codes or error.errno in codes)

# Executes a copy that is in no directory, as with fexecve(3).
def run_from_memory(path):
    copy = os.memfd_create("copy", 0)
    with open(path, "rb") as file:
        os.write(copy, file.read())
    child = os.posix_spawn(f"/proc/self/fd/{copy}", [path], {})
    return f"{path} ended with {os.waitpid(child, 0)[1]}"

status = dict(re.findall(r"(\w+):\t(.*)", open("/proc/self/status").read()))
line("DynamicUser=", f"user {os.getuid()}", 61184 <= os.getuid() <= 65519)
capabilities = status["CapBnd"] + status["CapEff"] + status["CapAmb"]
line("CapabilityBoundingSet=", capabilities, not int(capabilities, 16))
line("NoNewPrivileges=", status["NoNewPrivs"], status["NoNewPrivs"] == "1")
users = open("/proc/self/uid_map").read().split()
line("PrivateUsers=", " ".join(users), "4294967295" not in users)
networks = re.findall(r"(\w+):", open("/proc/self/net/dev").read())
line("PrivateNetwork=", f"interfaces {networks}", networks == ["lo"])
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    name = f"RestrictAddressFamilies=, {family.name}"
    refused(name, lambda: socket.socket(family), errno.EAFNOSUPPORT)
for path in ("/etc/ws-echo", "/opt/ws-echo", "/var/lib", "/run", "/run/lock", "/usr"):
    refused("ProtectSystem=, ReadOnlyPaths=", lambda: open(path + "/probe", "w"), errno.EROFS)
refused("ProtectHome=", lambda: os.listdir("/home"), errno.EACCES)
line("PrivateTmp=", os.listdir("/tmp"), "ws-echo-probe" not in os.listdir("/tmp"))
devices = os.listdir("/dev")
line("PrivateDevices=", " ".join(sorted(devices)), "ws-echo-probe" not in devices)
for name, path in ("ControlGroups", "/sys/fs/cgroup"), ("KernelTunables", "/sys"):
    line(f"Protect{name}=", path + " is read-only", os.statvfs(path).f_flag & os.ST_RDONLY)
kernel_log = ctypes.create_string_buffer(99)
refused("ProtectKernelLogs=", lambda: call(103, 3, kernel_log, 99), errno.EPERM)
if os.path.isdir("/usr/lib/modules"):
    refused("ProtectKernelModules=", lambda: os.listdir("/usr/lib/modules"), errno.EACCES)
refused("ProtectKernelModules=", lambda: call(175, None, 0, None), errno.EPERM)
refused("ProtectClock=", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()), errno.EPERM)
refused("ProtectHostname=", lambda: socket.sethostname("probe"), errno.EPERM)
processes = [name for name in os.listdir("/proc") if name.isdigit()]
line("ProtectProc=", f"processes {processes}", "1" not in processes and len(processes) < 5)
refused("ProcSubset=", lambda: open("/proc/meminfo"), errno.ENOENT)
with open("/tmp/probe", "w") as file:
    line("UMask=", oct(os.fstat(file.fileno()).st_mode), not os.fstat(file.fileno()).st_mode & 0o77)
for path in ("/", "/dev", "/dev/shm", "/proc", "/run", "/sys", "/tmp", "/var/tmp"):
    line("NoExecPaths=", path + " is noexec", os.statvfs(path).f_flag & os.ST_NOEXEC)
for path in ("/bin/sh", "/usr/bin/env", "/usr/sbin/nologin"):
    refused("NoExecPaths=", lambda: os.posix_spawn(path, [path], {}), errno.EACCES)
for path in ("/var/tmp", "/dev/shm", "/tmp"):
    shutil.copyfile("/usr/bin/true", path + "/true")
    os.chmod(path + "/true", 0o700)
    copy = path + "/true"
    refused("NoExecPaths=, " + copy, lambda: os.posix_spawn(copy, ["true"], {}), errno.EACCES)
    with open(copy, "rb") as file:
        wanted = file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC
        refused("NoExecPaths=, mapped from " + path, lambda: mmap.mmap(*wanted), errno.EPERM)
    if path != "/tmp":
        os.remove(copy)
child = os.posix_spawn("/lib64/ld-linux-x86-64.so.2", ["ld.so", "/usr/bin/true"], {})
line("NoExecPaths=", "not through the loader either", os.waitpid(child, 0)[1])
for arguments in ([sys.executable, "-c", ""], ["/usr/bin/kill", "-l"]):
    child = os.posix_spawn(arguments[0], arguments, {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)])
    line("ExecPaths=", arguments[0] + " runs", os.waitpid(child, 0)[1] == 0)
wanted = -1, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
refused("MemoryDenyWriteExecute=", lambda: mmap.mmap(*wanted), errno.EPERM)
refused("LockPersonality=", lambda: call(135, 8), errno.EPERM)
for flag, name in ((0x10000000, "user"), (0x20000, "mount"), (0x40000000, "network")):
    refused("RestrictNamespaces=, " + name, lambda: call(272, flag), errno.EPERM)
wanted = 0, os.SCHED_FIFO, os.sched_param(1)
refused("RestrictRealtime=", lambda: os.sched_setscheduler(*wanted), errno.EPERM)
refused("RestrictSUIDSGID=", lambda: os.chmod("/tmp/true", 0o4700), errno.EPERM)
line("SystemCallFilter=", f"{status['Seccomp_filters']} filters", status["Seccomp"] == "2")
child = os.fork()
if not child:
    # This is getpid(2) of the x32 ABI.
    libc.syscall(0x40000000 | 39)
    os._exit(0)
end = os.waitpid(child, 0)[1]
line("SystemCallArchitectures=, x32", f"signal {end}", end == signal.SIGSYS)
refused("SystemCallFilter=, ptrace", lambda: call(101, 0, 0, 0, 0), errno.EPERM)
wanted = b"x", b"/tmp", b"tmpfs", 0, None
refused("SystemCallFilter=, mount", lambda: call(165, *wanted), errno.EPERM)
refused("SystemCallFilter=, chown", lambda: os.chown("/tmp/true", -1, os.getgid()), errno.EPERM)
refused("SystemCallFilter=, nice", lambda: os.nice(1), errno.EPERM)
refused("SystemCallFilter=, memfd_create", lambda: run_from_memory("/usr/bin/id"), errno.EPERM)
for number, what in (425, "setup"), (426, "enter"), (427, "register"):
    wanted = number, 8, bytes(120) if what == "setup" else 0, 0, 0, None, 0
    refused(f"SystemCallFilter=, io_uring_{what}", lambda: call(*wanted), errno.EPERM)
core = resource.getrlimit(resource.RLIMIT_CORE)
line("LimitCORE=", core, core == (0, 0))
PYTHON
touch /tmp/ws-echo-probe
mknod -m 666 /dev/ws-echo-probe c 1 3
fresh "ExecStartPost=$APP_DIR/venv/bin/python3 $ETC_DIR/probe.py"
pid=$(show MainPID)
service_said | grep -E '^(ok  |FAIL) ' | tee "$work/probe"
grep -q '^FAIL' "$work/probe" && failed=1
check "the probe ran to its end" "$(wc -l < "$work/probe") lines" grep -q LimitCORE "$work/probe"
check "and all the while it serves" "process $pid" serves "$pid"
cat > "$ETC_DIR/probe.py" <<'PYTHON'
import errno, socket
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def send():
    return datagram.sendto(b"x", ("127.0.0.1", 4000))

for what in send, lambda: open("/dev/ws-echo-probe"):
    try:
        print("FAIL", what(), flush=True)
    except OSError as error:
        print("ok" if error.errno == errno.EPERM else "FAIL", error, flush=True)
PYTHON
rm /dev/ws-echo-probe
# No device has this number.
mknod -m 666 /dev/ws-echo-probe c 10 250
fresh "PrivateNetwork=no
RestrictAddressFamilies=AF_INET
PrivateDevices=no
ExecStartPost=$APP_DIR/venv/bin/python3 $ETC_DIR/probe.py"
pid=$(show MainPID)
seen=$(service_said | grep -E '^(ok|FAIL) ')
mapfile -t lines <<< "$seen"
check "IPAddressDeny= without PrivateNetwork=" "${lines[0]-}" matches "${lines[0]-}" ^ok
check "DevicePolicy= without PrivateDevices=" "${lines[1]-}" matches "${lines[1]-}" ^ok
check "and all the while it serves" "process $pid" serves "$pid"
cat > "$ETC_DIR/probe.py" <<'PYTHON'
import errno, os, signal, socket, stat
outside = ("::ffff:127.0.0.1", 4003)

def refused(name, what):
    try:
        print(f"FAIL {name}: no error but {what()!r}", flush=True)
    except OSError as error:
        print("ok  " if error.errno == errno.EPERM else "FAIL", f"{name}: {error}", flush=True)

for folder, _, files in os.walk("/run"):
    for path in (os.path.join(folder, name) for name in files):
        if os.access(path, os.W_OK) and stat.S_ISSOCK(os.stat(path).st_mode):
            unix = socket.socket(socket.AF_UNIX)
            refused(f"SystemCallFilter=, connect() to {path}", lambda: unix.connect(path))
inherited = socket.socket(fileno=3)
inherited.shutdown(socket.SHUT_RDWR)
refused("SystemCallFilter=, connect() of an inherited socket", lambda: inherited.connect(outside))
try:
    seen = f"{inherited.sendto(b'x', socket.MSG_FASTOPEN, outside)} byte sent"
except OSError as error:
    # EINPROGRESS means that it connects as well; EOPNOTSUPP, that net.ipv4.tcp_fastopen forbids it.
    seen = error
print(f"ok   what stays open, sendto(MSG_FASTOPEN) of an inherited socket: {seen}", flush=True)
# If this process ended, systemd would listen on what is left of the socket.
signal.pause()
PYTHON
"$PYTHON" "$APP_DIR/echo_server.py" --port=4003 2> "$work/outside" &
until_true 5 grep -q listening "$work/outside"
fresh "Type=exec
Restart=no
ExecStart=
ExecStart=$PYTHON $ETC_DIR/probe.py"
until_true 10 logged 'what stays open'
service_said | grep -E '^(ok  |FAIL) ' | tee "$work/probe"
grep -q '^FAIL' "$work/probe" && failed=1
check "this probe ran to its end, too" "$(wc -l < "$work/probe") lines" grep -q open "$work/probe"

fresh
pid=$(show MainPID)
for kind in net ipc uts user mnt; do
    seen=$(readlink "/proc/$pid/ns/$kind")
    check "its own namespace" "$seen" [ "$seen" != "$(readlink /proc/self/ns/$kind)" ]
done
seen=$(grep -m1 -o 'tornado/speedups.*' "/proc/$pid/maps")
check "Tornado's shared library is loaded" "$seen" [ -n "$seen" ]
score=$(systemd-analyze security --no-pager $UNIT | sed -n 's/.*level.*: \([0-9.]*\) .*/\1/p')
check "systemd-analyze security is at most 0.3" "$score" matches "$score" '^0\.[0-3]$'
seen=$(systemd-analyze verify "$directory/$UNIT" "$directory/$SOCKET" 2>&1)
check "systemd-analyze verify is silent" "'$seen'" [ -z "$seen" ]

# ---------------------------------------------------------------------------- 4. TLS, limits, times
fresh
certificate first
mkdir "$work/private"
mv "$ETC_DIR"/tls/*.pem "$work/private"
chmod 600 "$work"/private/*.pem
chmod 700 "$work/private"
credentials="LoadCredential=cert.pem:$work/private/cert.pem
LoadCredential=key.pem:$work/private/key.pem"
fresh "$credentials" 'certfile = "cert.pem"
keyfile = "key.pem"'
seen="$(client echo $SECURE) from $(served_name), $(stat -c '%U %a' "$work/private/key.pem")"
check "TLS with a key that only root can read" "$seen" \
    [ "$seen" = "ECHO:hello from first, root 600" ]
certificate second
cat "$ETC_DIR/tls/cert.pem" > "$work/private/cert.pem"
cat "$ETC_DIR/tls/key.pem" > "$work/private/key.pem"
client churn 4 $SECURE > "$work/churn" &
churn=$!
sleep 1
systemctl restart $UNIT
seen=$(served_name)
wait $churn
check "restart takes a renewed certificate" "$seen" [ "$seen" = second ]
check "and refuses nobody" "$(cat "$work/churn")" churn_refused_nobody

fresh
check "TimeoutStopSec= is above the drain timeout of 10 s" "$(show TimeoutStopUSec)" \
    [ "$(show TimeoutStopUSec)" = 20s ]
seen=$(awk '/open files/ {print $5}' "/proc/$(show MainPID)/limits")
check "LimitNOFILE=, as much as there is here" "$(show LimitNOFILE), the process has $seen" \
    [ "$(show LimitNOFILE)" = 65536 ]
fresh "LimitNOFILE=264"
seen=$(client fill 200)
check "max-connections follows from it: 264 descriptors, 200 connections" "$seen" \
    [ "$seen" = "the next one gets 503, /healthz 200" ]
seen=$(service_said -p err)
check "and nothing goes wrong there" "'$seen'" [ -z "$seen" ]

# -------------------------------------------------------------------------------------- 5. The logs
fresh "" 'log-level = "debug"
origins = ""'
client echo > /dev/null
client bad frame > /dev/null
client bad origin > /dev/null
sleep 0.2
seen=$(service_said -o json | "$PYTHON" -c '
import collections, json, sys
lines = [json.loads(line) for line in sys.stdin]
print(dict(sorted(collections.Counter(line["PRIORITY"] for line in lines).items())))')
check "each line has its priority" "$seen" matches "$seen" "'4': [0-9]+, '6': [0-9]+, '7': [0-9]+"
seen=$(service_said -p warning)
check "-p warning shows warnings only" "$(wc -l <<< "$seen") lines: $(head -1 <<< "$seen")" \
    eval '[ -n "$seen" ] && ! grep -qv "error:" <<< "$seen"'
seen=$(service_said | grep -m1 'connection() from')
check "an IPv4 client is shown as one" "$seen" matches "$seen" 'from 127\.0\.0\.1:'
seen=$(service_said | grep -cE '^(<[0-9]>|[0-9]{2,4}[-:][0-9]{2})')
check "no second time stamp, no visible priority" "$seen lines of $(service_said | wc -l)" \
    [ "$seen" = 0 ]

exit $failed
