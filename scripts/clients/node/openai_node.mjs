// OpenAI's client for Node.
import OpenAI from "openai";
import { MODEL, PARAMETERS, QUESTION, URL_, check, checkArguments, run } from "./cells.mjs";

const client = new OpenAI({ baseURL: `${URL_}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];
const tools = [{ type: "function", function: { name: "weather", description: "A forecast.", parameters: PARAMETERS } }];

await run({
  async answer() {
    const made = await client.chat.completions.create({ model: MODEL, messages, max_completion_tokens: 8 });
    check(made.choices[0].message.content && made.usage.completion_tokens === 8, made);
  },
  async stream() {
    const asked = { model: MODEL, messages, max_tokens: 12, temperature: 0 };
    const whole = await client.chat.completions.create(asked);
    const streamed = await client.chat.completions.stream(asked).finalContent();
    check(streamed === whole.choices[0].message.content, streamed);
  },
  async required() {
    const asked = { model: MODEL, messages, tools, tool_choice: "required", max_tokens: 64, temperature: 0 };
    const made = await client.chat.completions.create(asked);
    checkArguments(made.choices[0].message.tool_calls[0].function.arguments);
    const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
    checkArguments(streamed.choices[0].message.tool_calls[0].function.arguments);
  },
  async results() {
    let asked = 0;
    const runner = client.chat.completions.runTools({
      model: MODEL,
      messages,
      max_tokens: 64,
      tool_choice: { type: "function", function: { name: "weather" } },
      tools: [
        {
          type: "function",
          function: {
            name: "weather",
            parameters: PARAMETERS,
            parse: JSON.parse,
            function: (given) => (checkArguments(given), (asked += 1), "blue"),
          },
        },
      ],
    });
    await runner.done();
    check(asked >= 1, asked);
  },
  async responses() {
    const tool = { type: "function", name: "weather", parameters: PARAMETERS, strict: true };
    const asked = { model: MODEL, input: QUESTION, tools: [tool], tool_choice: "required", max_output_tokens: 64 };
    const made = await client.responses.stream(asked).finalResponse();
    checkArguments(made.output.find((item) => item.type === "function_call").arguments);
  },
});
