// The server's API: which models there are, and a text as a stream of pieces. No page in here.

export class ApiError extends Error {
  // kind: "key" (401), "busy" (429, 503), "gone" (404), "refused" (any other answer),
  // "unreachable" (none at all), "lost" (it broke off); `code` is the server's own word
  constructor(kind, { message = "", code = "", status = 0, seconds = 0 } = {}) {
    super(message);
    this.kind = kind;
    this.code = code;
    this.status = status;
    this.seconds = seconds; // until one may try again
  }
}

// What went wrong, in a form that can be kept. A mistake of this page is passed on to the console.
export function problemOf(error) {
  if (!(error instanceof ApiError)) throw error;
  const { kind, message, status, seconds } = error;
  return { kind, message, status, until: Date.now() + seconds * 1000 };
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

export async function listModels(key) {
  const answer = await ask("v1/models", { headers: headers(key), cache: "no-store" });
  try {
    return (await answer.json()).data ?? [];
  } catch {
    throw new ApiError("lost");
  }
}

// Gives {text}, {finish}, {tokens} and {step} (of the checkpoint that answers) as they come; ends after [DONE]. `signal` aborts the request,
// and the server stops computing.
export async function* stream(path, body, { key, signal }) {
  const answer = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventsOf(answer.body, signal)) {
    if (data === "[DONE]") return;
    const event = parsed(data);
    if (event.error) throw new ApiError("refused", { message: wordsOf(event) });
    const step = /^step_(\d+)_/.exec(event.system_fingerprint ?? "");
    if (step) yield { step: Number(step[1]) };
    const choice = event.choices?.[0];
    const text = choice?.text ?? choice?.delta?.content;
    if (text) yield { text };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (event.usage) yield { tokens: event.usage.completion_tokens };
  }
  throw new ApiError("lost"); // the end of the stream without [DONE] is no end
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("unreachable");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const { status } = answer;
  const kind = { 401: "key", 403: "key", 404: "gone", 429: "busy", 503: "busy" }[status];
  const seconds = Number(answer.headers.get("Retry-After")) || 1;
  const code = body?.error?.code ?? "";
  throw new ApiError(kind ?? "refused", { message: wordsOf(body), code, status, seconds });
}

function wordsOf(body) {
  const error = body?.error ?? body?.detail ?? "";
  return typeof error === "string" ? error : (error.message ?? "");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("lost"); // half an event: what is between us and the server cut it
  }
}

// The data of server-sent events, whatever pieces the network makes of them.
async function* eventsOf(bytes, signal) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) throw error;
    throw new ApiError("lost");
  } finally {
    reader.cancel().catch(() => {}); // already broken: there is nothing left to cancel
  }
}
