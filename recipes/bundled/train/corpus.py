"""Prose of documentation packages, as documents of sections.

Knows HTML and what is junk in manuals. Does not tokenise and does not split. Invariants: the same
files give the same documents in the same order, and no two paragraphs share a run of twelve words
(manuals are full of set phrases, and a small model would learn them by heart).
"""

import multiprocessing
import pathlib
import re
import unicodedata

from lxml import etree
from lxml import html

# Packages of Debian 12 whose documentation is under a permissive licence: see LICENSE-DATA.md.
PACKAGES = """
    rust-web-doc postgresql-doc-15 python3.11-doc sqlite3-doc python-django-doc python-flask-doc
    python-pytest-doc python-sqlalchemy-doc python-tornado-doc twisted-doc erlang-doc apache2-doc
    tomcat10-docs varnish-doc nodejs-doc cmake-doc llvm-14-doc clang-14-doc ghc-doc
    libboost1.81-doc dpdk-doc python-sklearn-doc python-scipy-doc python-pandas-doc
    python-skimage-doc python-astropy-doc python-sympy-doc python-dask-doc python-distributed-doc
    nova-doc neutron-doc cinder-doc swift-doc
""".split()

RUN = 12
LEAST_PARAGRAPH, LEAST_DOCUMENT = 60, 300  # characters
LETTERS = 0.88  # least share of letters and plain punctuation in a paragraph

JUNK = etree.XPath(
    "//pre|//table|//nav|//script|//style|//svg|//button|//header|//footer|//math|//textarea"
    "|//a[contains(@class,'headerlink') or contains(@class,'anchor') or contains(@class,'src')]"
    "|//*[contains(@class,'sphinxsidebar') or contains(@class,'related') or contains(@class,'footer')"
    " or contains(@class,'navheader') or contains(@class,'toctree') or contains(@class,'toc')"
    " or contains(@class,'breadcrumb') or contains(@class,'menu') or contains(@class,'math')]"
)
# One page per machine instruction; whole books on one page, which also stand page by page; lists.
PATHS = re.compile(
    r"/arch/|/print\.html|/all\.html|/(genindex|search|copyright|licen[cs]e|authors|contributors|py-modindex)"
    r"|change-?log|release[-_]?notes|rel_notes|whats_?new|/releases?/|/news", re.I
)
SPACE = re.compile(r"\s+")
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u00a0", "''\"\"--. ")
NOTICE = re.compile(
    r"(Changed|New|Deprecated|Added|Available) (in|since) |Copyright|\(c\)|Created using|Last updated|This file is part"
    r"|Permission (is|to)|Redistribution|THIS SOFTWARE|Licen[cs]ed under|Distributed under|Read more|See also"
    r"|Bases:|Type:|Inherits|Source code:|Go to the end|Click here|Total running time|Download "
)
COMMON = re.compile(r"\b(the|a|an|is|are|to|of|and|be|in|for|this)\b", re.I)
WORD = re.compile(r"[a-z0-9_']+")
NUMBERING = re.compile(r"^([A-Z]?\d*(\.\d+)*\.?|Chapter \d+\.|Appendix [A-Z]\.)\s+")


def words(text):
    return WORD.findall(text.lower())


def plain(element):
    text = unicodedata.normalize("NFC", SPACE.sub(" ", element.text_content())).strip()
    return text.translate(QUOTES)


def is_prose(text):
    if len(text) < LEAST_PARAGRAPH or not text[0].isupper() or text[-1] not in ".!?)" or NOTICE.match(text):
        return False
    letters = sum(c.isascii() and (c.isalpha() or c in " ,.'") for c in text)
    return letters > LETTERS * len(text) and len(COMMON.findall(text)) >= max(2, len(text) // 100)


def sections(path):
    """[(heading, [paragraph])] of one page, in order."""
    try:
        root = html.fromstring(path.read_bytes().decode("utf-8", errors="ignore").encode(), parser=html.HTMLParser(encoding="utf-8"))
    except (etree.ParserError, ValueError):
        return []
    for element in JUNK(root):
        if element.getparent() is not None and element.tag not in ("body", "html", "main"):
            element.drop_tree()
    out = [("", [])]
    for element in root.iter("h1", "h2", "h3", "h4", "h5", "p"):
        text = plain(element)
        if element.tag != "p":
            out.append((NUMBERING.sub("", text).strip("\u00b6\u00a7# "), []))
        elif is_prose(text):
            out[-1][1].append(text)
    return [section for section in out if section[1]]


def pages(folder):
    """HTML files in English under one unpacked package."""
    found = (p for p in pathlib.Path(folder).rglob("*") if p.name.endswith((".html", ".htm", ".html.en")))
    return sorted(p for p in found if p.is_file() and not p.is_symlink() and not PATHS.search(str(p.relative_to(folder))))


def runs(paragraph):
    """Hashes of every run of twelve words, or of the whole where it is shorter."""
    own = words(paragraph)
    return {hash(tuple(own[i : i + RUN])) for i in range(max(1, len(own) - RUN + 1))}


def documents(root):
    """(name, sections) of every page under root/PACKAGE that has prose of its own."""
    seen = set()
    with multiprocessing.Pool() as pool:
        for package in PACKAGES:
            folder = pathlib.Path(root) / package
            paths = pages(folder)
            assert paths, f"no pages under {folder}: unpack the package {package} there"
            for path, found in zip(paths, pool.imap(sections, paths, chunksize=16)):
                kept = []
                for heading, paragraphs in found:
                    fresh = []
                    for paragraph in paragraphs:
                        own = runs(paragraph)
                        if seen.isdisjoint(own):
                            fresh.append(paragraph)
                        seen |= own
                    if fresh:
                        kept.append((heading, fresh))
                if sum(len(p) for _, ps in kept for p in ps) >= LEAST_DOCUMENT:
                    yield f"{package}/{path.relative_to(folder)}", kept
