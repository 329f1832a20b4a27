/** What went wrong, as a sentence for the person at the page. */
export class Failure extends Error {
  constructor(message, { status = 0 } = {}) {
    const text = message.trim() || "Something went wrong";
    const first = /^\w+[_:.]/.test(text) ? text[0] : text[0].toUpperCase(); // names of fields stay as they are
    super(first + text.slice(1) + (/[.!?]$/.test(text) ? "" : "."));
    this.status = status;
  }
}
