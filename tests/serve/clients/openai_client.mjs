// OpenAI's client for Node: models, an answer, a stream, a call of a tool, an error.
import assert from "node:assert";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [url, folder] = process.argv.slice(2);
const found = createRequire(pathToFileURL(`${folder}/`)).resolve("openai");
const {default: OpenAI} = await import(pathToFileURL(found));
const client = new OpenAI({baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0});
const messages = [{role: "user", content: "hello"}];
const given = {model: "tiny", max_tokens: 20};

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.deepEqual(models, ["tiny"]);
const answer = await client.chat.completions.create({...given, messages});
assert.equal(answer.choices[0].message.content, "Grüße 🙂");
let text = "";
for await (const chunk of await client.chat.completions.create({...given, messages, stream: true}))
  text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, "Grüße 🙂");

const parameters = {type: "object", properties: {expression: {type: "string"}}};
let asked = null;
const calculator = ({expression}) => { asked = expression; return "19"; };
const runner = client.chat.completions.runTools({
  ...given, messages: [{role: "user", content: "call"}],
  tools: [{type: "function", function: {name: "calculator", parameters, parse: JSON.parse,
                                        function: calculator}}],
});
assert.equal(await runner.finalContent(), "Grüße 🙂");
assert.equal(asked, "12+7");
await assert.rejects(client.chat.completions.create({...given, messages, temperature: 9}),
                     (error) => error.status === 400 && error.param === "temperature");
console.log("ok");
