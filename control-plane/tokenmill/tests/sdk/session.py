"""A scripted session with the OpenAI SDK for Python: list, completion, chat, stream, error, abort."""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)

model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model

whole = client.completions.create(model=model, prompt="The server", max_tokens=8, temperature=0, logprobs=2)
assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length", whole
assert len(whole.choices[0].logprobs.token_logprobs) == 8
streamed = client.completions.create(model=model, prompt="The server", max_tokens=8, temperature=0, stream=True)
assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text

messages = [{"role": "user", "content": "What is a type?"}]
chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
assert chat.choices[0].message.role == "assistant" and len(chat.choices[0].logprobs.content) == 8
chunks = list(
    client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
)
assert chunks[0].choices[0].delta.role == "assistant"
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == chat.choices[0].message.content

for call, kind, param in [
    (lambda: client.completions.create(model="absent", prompt="x"), openai.NotFoundError, "model"),
    (lambda: client.completions.create(model=model, prompt="x", temperature=9), openai.BadRequestError, "temperature"),
    (lambda: client.chat.completions.create(model=model, messages=[]), openai.BadRequestError, "messages"),
]:
    try:
        call()
    except kind as error:
        assert error.param == param, (error.param, param)
        assert set(error.body) == {"message", "type", "param", "code"}, error.body
    else:
        raise AssertionError(f"{param} was accepted")

stream = client.completions.create(model=model, prompt="The", max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
next(iter(stream))
stream.close()
assert client.models.list().data[0].id == model
print("python session ok")
