// Vercel's AI SDK over its provider for servers with OpenAI's API.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { MODEL, PARAMETERS, QUESTION, URL_, check, checkArguments, run } from "./cells.mjs";

const provider = createOpenAICompatible({
  name: "gossamer",
  baseURL: `${URL_}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const asked = {
  model: provider(MODEL),
  prompt: QUESTION,
  temperature: 0,
  maxRetries: 0,
  maxOutputTokens: 64,
  providerOptions: { gossamer: { parallel_tool_calls: false } },
};
const weather = (execute) => tool({ description: "A forecast.", inputSchema: jsonSchema(PARAMETERS), execute });

await run({
  async answer() {
    const made = await generateText(asked);
    check(made.text && made.usage.outputTokens > 0, made.usage);
  },
  async stream() {
    const result = streamText({ ...asked, maxOutputTokens: 12 });
    let text = "";
    for await (const part of result.textStream) text += part;
    check(text && text === (await generateText({ ...asked, maxOutputTokens: 12 })).text, text);
  },
  async tools() {
    const made = await generateText({ ...asked, tools: { weather: weather() } });
    check(made.finishReason, made.finishReason);
  },
  async required() {
    const tools = { weather: weather() };
    const made = await generateText({ ...asked, tools, toolChoice: "required" });
    check(made.finishReason === "tool-calls", made.finishReason);
    checkArguments(made.toolCalls[0].input);
    const streamed = streamText({ ...asked, tools, toolChoice: { type: "tool", toolName: "weather" } });
    checkArguments((await streamed.toolCalls)[0].input);
  },
  async results() {
    let times = 0;
    await generateText({
      ...asked,
      tools: { weather: weather(async (given) => (checkArguments(given), (times += 1), "blue")) },
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
    });
    check(times === 1, times);
  },
  async structured() {
    const made = await generateObject({ ...asked, schema: jsonSchema(PARAMETERS) });
    checkArguments(made.object);
  },
});
