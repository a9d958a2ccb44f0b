"""Conversations made from documents: a heading or a defined term becomes a question, one paragraph
its answer.

Owns the chat format. Invariant: what `render` writes is what the chat template of
tokenizer_config.json writes for the same messages, byte for byte (prepare_data.py checks it).
"""

import re

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|eos|>"
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set ns = namespace(before='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + ns.before + message['content'] -}}{%- set ns.before = '' -%}"
    "{%- else -%}"
    "{%- set ns.before = ns.before + message['content'] + '\\n\\n' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in one paragraph.",
    "Answer the question in one paragraph.",
]
TOPIC = [
    "{}", "What is {}?", "What is {}?", "Explain {}.", "Tell me about {}.", "Describe {}.",
    "Can you explain {}?", "How does {} work?", "Write a paragraph about {}.",
]
TERM = ["What is {}?", "What is {}?", "What is {}?", "Explain what {} is.", "Tell me about {}.", "Define {}."]
DEFINED = re.compile(r"(An?|The) ([A-Za-z][\w-]*(?: [\w-]+){0,3}?) (is|are|provides|represents|contains|defines|allows) ")
# Openings that refer to something that is not in the answer.
REFERS = re.compile(r"(This|These|Those|It|They|That|However|Also|Note|In addition|For example|Such|Thus|Otherwise|Here|Then|But|And|As|So|See)\b")
# Headings that name a part of a page, not a thing.
PARTS = set(
    "description notes note examples example usage overview introduction parameters returns return arguments summary"
    " synopsis details see also compatibility outputs inputs methods attributes functions exports data types references"
    " implementations syntax options errors panics safety caveats motivation background requirements".split()
)
# Terms that say only where something stands.
VAGUE = re.compile(r"(following|first|second|third|last|next|previous|above|below|only|other|same|default|rest|main|new|current)\b", re.I)
SHORTEST, LONGEST, MOST_TURNS = 80, 700, 3


def topic(heading):
    """The heading as somebody would ask for it, or None where it says too little."""
    names = heading.split()
    if not 1 <= len(names) <= 7 or not 4 <= len(heading) <= 60 or heading.lower() in PARTS:
        return None
    if not re.fullmatch(r"[\w .,'+#:()/-]+", heading) or all(n.lower() in PARTS for n in names):
        return None
    return " ".join(n.lower() if re.fullmatch(r"[A-Z]?[a-z-]+", n) else n for n in names)


def pairs(sections, rng):
    """(question, answer) of one document."""
    for heading, paragraphs in sections:
        about = topic(heading)
        for index, answer in enumerate(paragraphs):
            if not SHORTEST <= len(answer) <= LONGEST or REFERS.match(answer):
                continue
            if (defined := DEFINED.match(answer)) and not VAGUE.match(defined.group(2)):
                article, term = defined.group(1).lower(), defined.group(2)
                yield TERM[rng.integers(len(TERM))].format(f"{article} {term}"), answer
            elif index == 0 and about:
                yield TOPIC[rng.integers(len(TOPIC))].format(about), answer


def conversations(sections, rng):
    """Lists of messages."""
    rest = list(pairs(sections, rng))
    while rest:
        turns = min(len(rest), int(rng.integers(1, MOST_TURNS + 1)))
        messages = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": SYSTEM[rng.integers(len(SYSTEM))]})
        for question, answer in rest[:turns]:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield messages
        rest = rest[turns:]


def render(messages):
    """The text of a conversation, without the opening BOS."""
    out, before = "", ""
    for message in messages:
        if message["role"] == "system":
            before += message["content"] + "\n\n"
        elif message["role"] == "user":
            out += USER + before + message["content"]
            before = ""
        else:
            out += ASSISTANT + message["content"] + END
    return out
