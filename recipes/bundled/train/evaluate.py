"""What the model card reports: held-out bits per byte, and whether continuations repeat the training
text.

    python evaluate.py DATA MODEL

Loads MODEL with transformers (which also proves that the checkpoint is complete), computes the
held-out loss in float32, draws 50 continuations of the first words of held-out paragraphs, and
looks for any run of 12 words of a continuation in the training text. Prints a JSON summary and 20
continuations in Markdown.
"""

import json
import pathlib
import re
import sys

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import DeepseekV3ForCausalLM

CONTEXT, RUN, COUNT, SHOWN, PROMPT_WORDS, NEW = 512, 12, 50, 20, 6, 80
TEMPERATURE, TOP_P, SEED = 0.8, 0.95, 7


def words(text):
    return re.findall(r"[a-z0-9_']+", text.lower())


def held_out(model, data, device):
    ids = np.load(data / "held.npy").astype(np.int64)
    nll, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, CONTEXT):
            part = torch.from_numpy(ids[start : start + CONTEXT + 1])[None].to(device)
            logits = model(part[:, :-1]).logits.float()
            nll += torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum").item()
            count += part.shape[1] - 1
    size = len((data / "held.txt").read_text("utf-8").encode())
    return nll / count, nll / np.log(2) / size


def main():
    data, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model.to(device).eval()
    loss, bits = held_out(model, data, device)

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    held = [p for p in re.split(r"\n\n+", (data / "held.txt").read_text("utf-8")) if len(words(p)) > 20]
    picked = np.random.default_rng(SEED).choice(len(held), COUNT, replace=False)
    prompts = [" ".join(held[i].split()[:PROMPT_WORDS]) for i in picked]
    training = words((data / "train.txt").read_text("utf-8"))
    runs = {hash(tuple(training[i : i + RUN])) for i in range(len(training) - RUN + 1)}

    torch.manual_seed(SEED)
    texts, repeated = [], 0
    for prompt in prompts:
        ids = torch.tensor([[0, *tokenizer.encode(prompt).ids]], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, temperature=TEMPERATURE,
            top_p=TOP_P, top_k=0, eos_token_id=1, pad_token_id=1,
        )
        text = tokenizer.decode(out[0].tolist(), skip_special_tokens=True)
        texts.append((prompt, text[len(prompt) :]))
        own = words(text)
        repeated += any(hash(tuple(own[i : i + RUN])) in runs for i in range(len(own) - RUN + 1))
    summary = {
        "held_out_loss_per_token": round(loss, 4), "held_out_bits_per_byte": round(bits, 4),
        "continuations": COUNT, "with_a_verbatim_run_of_12_words": repeated,
        "parameters": sum(p.numel() for p in model.parameters()),
        "temperature": TEMPERATURE, "top_p": TOP_P, "seed": SEED,
    }
    print(json.dumps(summary))
    for prompt, text in texts[:SHOWN]:
        print(f"- **{prompt}**{text.replace(chr(10), ' ')}")


main()
