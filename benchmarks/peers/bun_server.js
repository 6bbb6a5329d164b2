// Bun's built-in server: `bun bun_server.js PORT [deflate]`.
const prefix = Buffer.from("ECHO:");
const limit = 16 * 1024 * 1024;
const deflate = process.argv.includes("deflate");

Bun.serve({
  hostname: "127.0.0.1",
  port: Number(process.argv[2]),
  fetch(request, server) {
    if (server.upgrade(request)) return undefined;
    return new Response("This is a WebSocket server.", { status: 426 });
  },
  websocket: {
    maxPayloadLength: limit,
    // Bun drops what does not fit; an 8 MiB reply must.
    backpressureLimit: 2 * limit,
    perMessageDeflate: deflate,
    message(socket, data) {
      // A string is sent as text, a Buffer as binary.
      socket.send(typeof data === "string" ? "ECHO:" + data : Buffer.concat([prefix, data]), deflate);
    },
  },
});
console.log("ready");
