// The same as cells.py, for programs of Node.
export const [URL_, MODEL] = process.argv.slice(2, 4);
export const QUESTION = "What is the weather in Paris?";
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};

export function check(truth, what) {
  if (!truth) throw new Error(`wrong: ${JSON.stringify(what)}`);
}

export function checkArguments(found) {
  const values = typeof found === "string" ? JSON.parse(found) : found;
  check(["Paris", "Oslo"].includes(values.city) && Number.isInteger(values.days), values);
}

export async function run(cells) {
  for (const [feature, cell] of Object.entries(cells)) {
    let fault = null;
    try {
      await cell();
    } catch (error) {
      console.error(error);
      fault = `${error.name}: ${error.message}`;
    }
    console.log(JSON.stringify({ feature, fault }));
  }
}
