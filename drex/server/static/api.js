// The server as the page knows it: its models, streams of completions, and errors in words.

const KEY = "drex-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refused, or why it can't be had. `param` is the field at fault, if one is. */
export class ServerError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    Object.assign(this, { status, param });
  }

  /** Whether the request is at fault, or came at a bad time; otherwise the server or the way to it is. */
  get refused() {
    return this.status >= 400 && this.status < 500;
  }
}

async function ask(path, { body, signal } = {}) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["content-type"] = "application/json";
  let reply;
  try {
    const sent = body ? JSON.stringify(body) : undefined;
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: sent, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server at ${location.host} can't be reached: is it still running?`);
  }
  if (reply.ok) return reply;
  const said = await reply.json().then((found) => found.error, () => null);
  throw new ServerError(sentence(said?.message ?? `the server answered ${reply.status}`), reply.status, said?.param);
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.?!…]$/.test(text) ? "" : "."}`;

/** The first served model: its name, and where it may exit. */
export async function model(signal) {
  return (await (await ask("v1/models", { signal })).json()).data[0];
}

export async function version() {
  return (await (await ask("version")).json()).version;
}

/** The whole of a completion. */
export async function complete(body, signal) {
  return (await ask("v1/completions", { body, signal })).json();
}

/** The chunks of a streamed completion, as they come. */
export async function* stream(body, signal) {
  const reply = await ask("v1/completions", { body: { ...body, stream: true }, signal });
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message), chunk.error.code, chunk.error.param);
    yield chunk;
  }
  throw new ServerError("The stream broke off before it was finished: the server may have stopped.");
}

/** The data of server-sent events, of which a piece from the network may hold several, or a part of one. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield part.slice("data: ".length);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke off: the server may have stopped.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
