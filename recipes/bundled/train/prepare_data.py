"""From documentation packages to token files for train.py.

Takes folders of HTML, keeps prose paragraphs (no code listings, tables, navigation, lists of machine
instructions), drops every paragraph that repeats twelve words of an earlier one (manuals are full of
set phrases, and a small model would learn them by heart), holds out 2 % of the documents, trains a byte-level BPE of 2,048 entries on the
rest, and writes train.npy and held.npy (uint16 token ids), train.txt and held.txt, tokenizer.json.

    apt-get download rust-web-doc postgresql-doc-15 python3.11-doc    # Debian 12; dpkg -x each
    python prepare_data.py OUT x_rust-web-doc x_postgresql-doc-15 x_python3.11-doc
"""

import html
import pathlib
import re
import sys
import unicodedata

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
VOCAB = 2048
RUN = 12
HELD_OUT = 50  # one document in so many

PARAGRAPH = re.compile(r"<p(?:\s[^>]*)?>(.*?)</p>", re.S)
CUT = re.compile(r"<(pre|table|nav|script|style|svg)\b.*?</\1>", re.S)
TAG = re.compile(r"<[^>]+>")
SPACE = re.compile(r"\s+")
NOTICE = re.compile(r"(Changed|New|Deprecated|Added|Available) (in|since) ")


def paragraphs(path):
    """Prose of one HTML file, in order."""
    text = CUT.sub(" ", path.read_text("utf-8", errors="ignore"))
    for match in PARAGRAPH.finditer(text):
        plain = html.unescape(TAG.sub("", match.group(1)))
        plain = unicodedata.normalize("NFC", SPACE.sub(" ", plain)).strip()
        plain = plain.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"').replace("\u2014", "-")
        letters = sum(c.isascii() and (c.isalpha() or c in " ,.'") for c in plain)
        if len(plain) >= 60 and plain[0].isupper() and plain[-1] in ".:!?)" and letters > 0.88 * len(plain):
            yield plain


def runs(paragraph):
    """Hashes of every run of twelve words, or of the whole where it is shorter."""
    words = re.findall(r"[a-z0-9_']+", paragraph.lower())
    return {hash(tuple(words[i : i + RUN])) for i in range(max(1, len(words) - RUN + 1))}


def documents(folders):
    """Documents of paragraphs that share no run of words with an earlier one."""
    seen = set()
    for folder in folders:
        for path in sorted(pathlib.Path(folder).rglob("*.html")):
            if "/arch/" in str(path):
                continue  # one page per machine instruction
            kept = []
            for paragraph in paragraphs(path):
                own = runs(paragraph)
                if seen.isdisjoint(own) and not NOTICE.match(paragraph):
                    kept.append(paragraph)
                seen |= own
            if sum(map(len, kept)) >= 300:
                yield "\n\n".join(kept)


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    docs = list(documents(sys.argv[2:]))
    held = [d for i, d in enumerate(docs) if i % HELD_OUT == 7]
    train = [d for i, d in enumerate(docs) if i % HELD_OUT != 7]
    np.random.default_rng(0).shuffle(train)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        train,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(out / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    for name, part in (("train", train), ("held", held)):
        ids = []
        for encoding in tokenizer.encode_batch(part):
            ids += [bos, *encoding.ids, eos]
        np.save(out / f"{name}.npy", np.array(ids, dtype=np.uint16))
        (out / f"{name}.txt").write_text("\n\n\n".join(part), "utf-8")
        size = sum(len(d.encode()) for d in part)
        print(f"{name}: {len(part)} documents, {size} bytes, {len(ids)} tokens")


main()
