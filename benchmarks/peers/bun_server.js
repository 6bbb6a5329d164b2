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
    // Bun drops a reply that exceeds this limit, and the largest has to fit.
    backpressureLimit: 2 * limit,
    perMessageDeflate: deflate,
    message(socket, data) {
      // A string is sent as text, a Buffer as binary.
      const isText = typeof data === "string";
      socket.send(isText ? "ECHO:" + data : Buffer.concat([prefix, data]), deflate);
    },
  },
});
console.log("ready");
