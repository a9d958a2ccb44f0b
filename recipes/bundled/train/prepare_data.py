"""From documentation packages to what train.py and evaluate.py read.

    apt-get download PACKAGE...          # those of corpus.PACKAGES, Debian 12
    dpkg -x PACKAGE_*.deb ROOT/PACKAGE   # each into a folder of its own name
    python prepare_data.py ROOT OUT [--vocab 2048]

About 2 % of the pages are held out, chosen by a hash of their name. A quarter of the others also
appear as conversations (chat.py). Writes train.npy and held.npy (uint16 ids of `BOS document EOS`
one after another), train.txt and held.txt (documents separated by three newlines), and the tokenizer as
a server reads it: tokenizer.json, whose post-processor adds BOS, and tokenizer_config.json. Needs lxml,
numpy, tokenizers and transformers.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import chat
import corpus

BOS, EOS = "<|bos|>", "<|eos|>"
SPECIALS = [BOS, EOS, chat.USER, chat.ASSISTANT]
CONTEXT = 2048
HELD_OUT, CONVERSED = 2, 27  # of a hundred pages: the first 2 are held out, the next 25 also conversations


def split(root):
    """(training documents, held-out documents, conversations)."""
    train, held, talks = [], [], []
    rng = np.random.default_rng(0)
    for name, sections in corpus.documents(root):
        share = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % 100
        text = "\n\n".join(p for _, paragraphs in sections for p in paragraphs)
        (held if share < HELD_OUT else train).append(text)
        if HELD_OUT <= share < CONVERSED:
            talks.extend(chat.conversations(sections, rng))
    return train, held, talks


def train_tokenizer(texts, vocab):
    """Byte-level BPE; with special tokens, BOS opens every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer, out):
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "add_bos_token": True,
        "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT, "chat_template": chat.TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_format(out, tokenizer, talks):
    """The template writes what is trained on, and both ways of encoding open with one BOS."""
    loaded = AutoTokenizer.from_pretrained(out)
    for messages in talks[:200]:
        text = BOS + chat.render(messages)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded.apply_chat_template(messages, tokenize=False) == text
        assert loaded.apply_chat_template(messages, return_dict=False) == ids
        assert loaded.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False) == text[: text.rindex(chat.ASSISTANT)] + chat.ASSISTANT
        assert loaded(chat.render(messages)).input_ids == ids


def write(out, name, texts, tokenizer):
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids = []
    for start in range(0, len(texts), 4096):
        for encoding in tokenizer.encode_batch(texts[start : start + 4096], add_special_tokens=False):
            ids += [bos, *encoding.ids] + [eos] * (encoding.ids[-1] != eos)
    np.save(out / f"{name}.npy", np.array(ids, dtype=np.uint16))
    (out / f"{name}.txt").write_text("\n\n\n".join(texts), "utf-8")
    print(f"{name}: {len(texts)} documents, {sum(len(t.encode()) for t in texts)} bytes, {len(ids)} tokens", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--vocab", type=int, default=2048)
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # hashes of words decide which paragraphs repeat
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    args.out.mkdir(parents=True, exist_ok=True)
    train, held, talks = split(args.root)
    tokenizer = train_tokenizer(train, args.vocab)
    save_tokenizer(tokenizer, args.out)
    check_format(args.out, tokenizer, talks)
    texts = [text for text in train] + [chat.render(messages) for messages in talks]
    print(f"{len(train)} pages, {len(talks)} conversations of {sum(len(chat.render(m)) for m in talks)} characters")
    np.random.default_rng(0).shuffle(texts)
    write(args.out, "train", texts, tokenizer)
    write(args.out, "held", held, tokenizer)


if __name__ == "__main__":
    main()
