"""What the model card reports, computed from the files that are served.

    python evaluate.py DATA MODEL

Loads MODEL with transformers (which also proves that the checkpoint is complete) in float32 and prints
Markdown: held-out loss over windows of the whole context, the same by position (in packed windows,
where every bucket scores the same tokens; and in held-out documents that fill the context by themselves), 50 continuations of the
first words of held-out paragraphs of which 20 are shown, how many of the 50 hold a run of 12 words
of the training text, and two answers to chats.
"""

import json
import pathlib
import re
import sys

import numpy as np
import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

CONTEXT, BUCKET, BOS, EOS = 2048, 256, 0, 1
RUN, COUNT, SHOWN, PROMPT_WORDS, NEW, NEW_CHAT = 12, 50, 20, 6, 80, 400
TEMPERATURE, TOP_P, SEED = 1.0, 0.9, 7  # as generation_config.json has them
QUESTIONS = ["What is a thread?", "Explain indexes in a database."]


def words(text):
    return re.findall(r"[a-z0-9_']+", text.lower())


@torch.no_grad()
def losses(model, inputs, targets):
    """Negative log-likelihood of every target; 0 where the target opens a document."""
    logits = model(torch.from_numpy(inputs)[None].to(model.device)).logits[0].float()
    targets = torch.from_numpy(targets).to(model.device)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return nll.masked_fill(targets == BOS, 0.0).double().cpu().numpy()


def whole(model, data, ids):
    """Nats per token and bits per byte, every token a target once."""
    nll, count, start = 0.0, 0, 0
    while start < len(ids):
        start += int(ids[start] == BOS)
        targets = ids[start : start + CONTEXT]
        nll += losses(model, np.concatenate(([BOS], targets[:-1])), targets).sum()
        count += (targets != BOS).sum()
        start += CONTEXT
    size = sum(len(d.encode()) for d in (data / "held.txt").read_text("utf-8").split("\n\n\n"))
    return nll / count, nll / np.log(2) / size


def by_position(model, ids):
    """Means by bucket where windows start at every bucket, so that each bucket scores the same tokens."""
    total = np.zeros(CONTEXT // BUCKET)
    last = (len(ids) - CONTEXT) // BUCKET * BUCKET
    scored = ids[CONTEXT - BUCKET : last + BUCKET]
    for start in range(0, last + 1, BUCKET):
        targets = ids[start : start + CONTEXT]
        opens = int(targets[0] == BOS)  # the document brings its own
        row = losses(model, np.concatenate(([BOS], targets[:-1]))[opens:], targets[opens:])
        row = np.concatenate((np.zeros(CONTEXT - len(row)), row)).reshape(-1, BUCKET).sum(1)
        at = start + np.arange(0, CONTEXT, BUCKET)
        total += row * ((at >= CONTEXT - BUCKET) & (at <= last))
    return total / (scored != BOS).sum()


def alone(model, ids):
    """The same over documents that fill the context by themselves, and how many they are."""
    starts = np.append(np.flatnonzero(ids == BOS), len(ids))
    rows = [losses(model, ids[a : a + CONTEXT], ids[a + 1 : a + CONTEXT + 1]) for a, b in zip(starts, starts[1:]) if b - a > CONTEXT]
    return np.mean(rows, 0).reshape(-1, BUCKET).mean(1), len(rows)


def sample(model, tokenizer, ids, limit):
    """The new tokens."""
    ids = torch.tensor([ids], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=True, temperature=TEMPERATURE,
        top_p=TOP_P, top_k=0, eos_token_id=EOS, pad_token_id=EOS,
    )
    return out[0, ids.shape[1] :].tolist()


def main():
    data, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.load(data / "held.npy").astype(np.int64)
    loss, bits = whole(model, data, ids)
    packed, (own, long) = by_position(model, ids), alone(model, ids)

    held = [p for p in re.split(r"\n\n+", (data / "held.txt").read_text("utf-8")) if len(words(p)) > 20]
    picked = np.random.default_rng(SEED).choice(len(held), COUNT, replace=False)
    prompts = [" ".join(held[i].split()[:PROMPT_WORDS]) for i in picked]
    training = words((data / "train.txt").read_text("utf-8"))
    runs = {hash(tuple(training[i : i + RUN])) for i in range(len(training) - RUN + 1)}

    torch.manual_seed(SEED)
    texts, repeated = [], 0
    for prompt in prompts:
        text = tokenizer.decode(sample(model, tokenizer, tokenizer(prompt).input_ids, NEW), skip_special_tokens=True)
        texts.append((prompt, text))
        said = words(prompt + text)
        repeated += any(hash(tuple(said[i : i + RUN])) in runs for i in range(len(said) - RUN + 1))
    print(json.dumps({
        "held_out_nats_per_token": round(loss, 4), "held_out_bits_per_byte": round(bits, 4),
        "continuations": COUNT, "with_a_verbatim_run_of_12_words": repeated,
        "parameters": sum(p.numel() for p in model.parameters()),
        "temperature": TEMPERATURE, "top_p": TOP_P, "seed": SEED,
    }))
    print(f"\n| positions | packed windows | {long} documents of their own |\n| --- | --- | --- |")
    for bucket, (a, b) in enumerate(zip(packed, own)):
        print(f"| {bucket * BUCKET} to {(bucket + 1) * BUCKET - 1} | {a:.3f} | {b:.3f} |")
    print()
    for prompt, text in texts[:SHOWN]:
        print(f"- **{prompt}**{text.replace(chr(10), ' ')}")
    print()
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        new = sample(model, tokenizer, tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), NEW_CHAT)
        end = "EOS" if new[-1] == EOS else "the limit"
        print(f"- **{question}** {tokenizer.decode(new, skip_special_tokens=True)} *({len(new)} tokens, ended by {end})*")


if __name__ == "__main__":
    main()
