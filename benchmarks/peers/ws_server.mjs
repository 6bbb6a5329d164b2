// Node's ws: `node ws_server.mjs PORT [deflate]`.
// An ES module's bare import does not look at NODE_PATH, require() does.
import { createRequire } from "node:module";

const { WebSocketServer } = createRequire(import.meta.url)("ws");

const prefix = Buffer.from("ECHO:");
const server = new WebSocketServer({
  host: "127.0.0.1",
  port: Number(process.argv[2]),
  maxPayload: 16 * 1024 * 1024,
  perMessageDeflate: process.argv.includes("deflate"),
});

server.on("connection", (socket) => {
  // A string is sent as text, a Buffer as binary.
  socket.on("message", (data, isBinary) => {
    socket.send(isBinary ? Buffer.concat([prefix, data]) : "ECHO:" + data);
  });
  socket.on("error", () => {});
});
server.on("listening", () => console.log("ready"));
