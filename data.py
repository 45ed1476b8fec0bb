"""Text in, batches out: tokenizers, corpora, binary token shards, and the batches cut from them.

In reading order: tokenizers turn text into ids; fetch downloads a file; read_source finds the text of a known
corpus or a path; prepare writes its ids as shards; load opens shards; Tokens cuts batches from them, and
Stream cuts them from a source that is not prepared.

    python data.py prepare shakespeare       # or pystdlib, or a path: a text, a .jsonl, a folder of texts
    python data.py prepare web.jsonl.gz --field=body --name=web # .csv .parquet too; .gz and .zst are unpacked
    python data.py prepare c4 --max_tokens=1_000_000_000 # or tinystories, wikipedia, fineweb, wikitext
    python data.py prepare book.txt --tokenizer=gpt2        # char (default), ascii, gpt2, byte or FILE.json
    python data.py prepare folder --tokenizer=FILE.json     # of shard_*.npy: rows of ids that FILE.json made
    python data.py tokenizer book.txt --vocab_size=4096     # trains a FILE.json on a text's training part
    python data.py verify shakespeare        # or data/shakespeare: reads all, checks sizes, hashes and ids
    python data.py list                      # what is known and what is prepared

A dataset is a folder data/NAME/, and nothing in it is a pickle:
    train_000000.bin, val_000000.bin    256 int32 (magic, version, token count, zeros), then the tokens
    meta.json                           source, whole tokenizer, split, the sha256 of every shard

B rows of a batch   T block_size   N tokens of a shard   an "id" is a token's number, 0 <= id < vocab_size
"""
from configurator import UserError, configure # first: see stop_at_once there

import codecs
import csv
import difflib
import gzip
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import string
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import requests
import torch
import urllib3 # comes with requests, and raises errors of its own while a response is read

try:
    import fcntl
except ImportError:
    fcntl = None # Windows has no such locks: two calls at once do not wait for each other there

# --- settings of the command line ---
tokenizer = "char" # char, ascii, gpt2, byte, or a FILE.json that we or Hugging Face's tokenizers saved
val_fraction = 0.1 # share of the characters, from the end of the text, that becomes the validation split
data_dir = "data" # folder of prepared datasets and of downloaded files
max_tokens = 0 # most tokens to train on; 0: all, but 100 million of c4, wikipedia and fineweb
name = "" # folder of the dataset inside data_dir; "": the name of the source
vocab_size = 4096 # ids of a tokenizer that is trained here: 256 bytes, one separator, the rest joins bytes
field = "" # column of a .csv, or key of a .jsonl or .parquet, that holds the text; "": text, and a .csv whole

# Private names, because configure takes every public number or text for a setting.
_FORMAT = 1 # version of meta.json: raise it with a change that makes older folders unreadable
_HEADER = 1024 # bytes of a shard's header: 256 int32
_SHARD = 100_000_000 # most tokens of one file, as in llm.c: 200 MB of uint16
_CHUNK = 2 ** 22 # tokens of the shuffle buffer of a stream
_VALIDATION = 2 ** 20 # most tokens that a stream validates on
_PIECE = 2 ** 16 # characters or bytes that are read, encoded and written at a time
_LONGEST = 2 ** 24 # characters that may have to be in memory together, as a line of .jsonl does
_RATIO = 200 # times its size that a packed text may take: text packs 3 to 50 times, a bomb 1,000
_THREADS = min(len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)), 16)
_DEADLINE = 600 # seconds that a download may take in all
_TIMEOUT = (10, 30) # seconds to connect, seconds without a byte
_PATIENCE = 300 # most seconds that a server may ask to wait: the hub counts requests in windows of 5 minutes

FAILURES = requests.RequestException, urllib3.exceptions.HTTPError # of a request that may be tried again
# (magic, version) of a header -> type of a token: the headers of llm.c, the second for Llama 3's vocabulary.
WIDTHS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
TEXTS = {".txt", ".md", ".py", ".jsonl", ".csv"} # meant as text; any other file of a folder may be anything
CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b")) # characters that even a log does not have
FIRST_BYTES = { # first bytes of files that are no text -> what the file is, and the way out
    b"\x1f\x8b": "gzip, not text: name it FILE.gz, or unpack it with gunzip -k",
    b"\x28\xb5\x2f\xfd": "zstd, not text: name it FILE.zst, or unpack it with unzstd",
    b"%PDF": "a PDF, not text: take its text out, say with pdftotext",
    b"PK\3\4": "a zip archive (as .docx and .epub are), not text: take its text out",
    b"\x93NUMPY": "a numpy array, not text: call it shard_0.npy and prepare its folder",
    **{np.array(key, "<i4").tobytes(): "a shard of tokens, not text: name its folder" for key in WIDTHS}}


# --- tokenizers ---
class Tokenizer:
    """Base class. Every tokenizer has name, vocab_size, encode(text) -> array of ids, decode(ids) -> text."""
    eot = None # id that separates documents; a newline does where there is no such id

    def __init__(self, char_to_id: dict | None = None, data_dir: str = "data"):
        self.data_dir = data_dir

    def to_dict(self) -> dict:
        """What tokenizer_from_dict needs to make this tokenizer again, ready for JSON."""
        return {"name": self.name}

    def to_hf(self) -> str:
        """The text of a tokenizer.json, by which Hugging Face's `tokenizers` gives a text the same ids."""
        raise NotImplementedError

    def for_prepare(self, path: Path, write: bool = True) -> str:
        """What prepare takes for this tokenizer: its name, or path, to which it is written."""
        kind = TOKENIZERS.get(self.name)
        if kind not in (None, CharTokenizer) and kind().to_dict() == self.to_dict():
            return self.name
        if write:
            path.write_text(json.dumps(self.to_dict()), encoding="utf-8")
        return str(path)

    def unknown(self, text: str) -> list[str]:
        """The distinct characters of text that have no id."""
        return []

    def cut(self, text: str) -> int:
        """Where text may be divided: the ids of the parts, joined, are the ids of the whole. 0: nowhere."""
        return len(text)

    def readable(self, ids: list[int]) -> str:
        """decode for what a model wrote. An id of a padded vocabulary means nothing and becomes U+FFFD."""
        runs = itertools.groupby(ids, key=lambda i: 0 <= i < self.vocab_size) # a character may span ids
        return "".join(self.decode([*run]) if known else "\ufffd" * len([*run]) for known, run in runs)

    def count_bytes(self, ids) -> int:
        """Bytes of UTF-8 that the text of ids has, by which losses of different tokenizers compare.

        eot counts as one, like the newline that other tokenizers have between documents.
        """
        ids = self.checked(ids)
        text = ids[ids != (-1 if self.eot is None else self.eot)]
        return len(ids) - len(text) + self.bytes_of(text)

    def bytes_of(self, ids):
        return len(self.decode(ids).encode("utf-8", "surrogatepass"))

    def checked(self, ids) -> np.ndarray:
        """A list, array or tensor of ids as a flat int64 array. UserError for an id that is out of range."""
        ids = np.asarray(ids.cpu() if torch.is_tensor(ids) else ids, dtype=np.int64).reshape(-1)
        # A look-up would take -1 for the last entry, in silence.
        if len(bad := ids[(ids < 0) | (ids >= self.vocab_size)]):
            raise UserError(f"cannot decode id {bad[0]}: this tokenizer has 0 to {self.vocab_size - 1}")
        return ids


class CharTokenizer(Tokenizer):
    """One id per character, as in nanoGPT's shakespeare_char. UserError for a character that has no id."""
    name, unk = "char", -1 # unk: the id of a character without one

    def __init__(self, char_to_id: dict, data_dir: str = "data"):
        numbers = {repr(i) for i in char_to_id.values()} # repr, because True == 1
        if not char_to_id or numbers != set(map(str, range(len(char_to_id)))):
            raise ValueError("the ids are not 0, 1, 2 ... without a hole")
        self.char_to_id, self.vocab_size = char_to_id, len(char_to_id)
        chars = {char: i for char, i in char_to_id.items() if char not in ("<PAD>", "<UNK>")}
        # Two tables make encode and decode one numpy look-up each, instead of a loop over the characters.
        # The last entry of ids serves all code points beyond. U+FFFD shows an <UNK>.
        self.ids = np.full(max(map(ord, chars), default=0) + 2, self.unk, np.int32) # code point -> id
        self.points = np.full(self.vocab_size, 0xFFFD, "<u4") # id -> code point
        for char, i in chars.items():
            self.ids[ord(char)], self.points[i] = i, ord(char)

    def to_dict(self):
        id_to_char = {str(i): char for char, i in self.char_to_id.items()}
        return {"name": self.name, "char_to_id": self.char_to_id, "id_to_char": id_to_char}

    def to_hf(self):
        return bpe_json(self.char_to_id, unk_token="<UNK>" if self.unk >= 0 else None, of_bytes=False)

    def look_up(self, text):
        """(code points, ids) of text, both (len(text),)."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4") # UTF-32 is the code points
        return points, self.ids[np.minimum(points, len(self.ids) - 1)]

    def unknown(self, text):
        points, ids = self.look_up(text)
        return [chr(point) for point in np.unique(points[ids == self.unk])]

    def encode(self, text):
        ids = self.look_up(text)[1]
        if (ids < 0).any():
            lost = listed(map(repr, self.unknown(text)))
            raise UserError(f"the vocabulary of {self.vocab_size} characters lacks {lost}\n"
                            "leave them out, or prepare the data with --tokenizer=byte, which has all")
        return ids.astype(token_type(self.vocab_size))

    def decode(self, ids):
        return self.points[self.checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")


class AsciiTokenizer(CharTokenizer):
    """One table: <PAD> 0, <UNK> 1, printable ASCII 2 to 96, newline 97, tab 98. All others are <UNK>."""
    name = "ascii"

    def __init__(self, char_to_id: dict | None = None, data_dir: str = "data"):
        printable = {chr(c): c - 30 for c in range(32, 127)}
        table = char_to_id or {"<PAD>": 0, "<UNK>": 1, **printable, "\n": 97, "\t": 98}
        self.pad, self.unk = special = table["<PAD>"], table["<UNK>"]
        # Some saved tables also give the character "\0" the id of <UNK>. An id has one entry, so "\0" goes.
        super().__init__({c: i for c, i in table.items() if c in ("<PAD>", "<UNK>") or i not in special})

    def decode(self, ids):
        ids = self.checked(ids)
        return super().decode(ids[ids != self.pad])


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: any text, no vocabulary. A lone surrogate comes back as U+FFFD."""
    name, vocab_size = "byte", 256

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype("<u2") # as in a shard

    def decode(self, ids):
        # "replace", because a model may stop inside a character.
        return self.checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def bytes_of(self, ids):
        return len(ids) # not by decode: ids may end inside a character

    def to_hf(self): # which shows a byte as a visible character: itself, or one from 256 on
        visible = {*range(33, 127), *range(161, 256)} - {173}
        hidden = [b for b in range(256) if b not in visible]
        letter = {b: chr(256 + hidden.index(b) if b in hidden else b) for b in range(256)}
        return bpe_json({letter[b]: b for b in letter})


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pairs, by tiktoken. The first encode or decode fetches its files."""
    name, eot, vocab_size = "gpt2", 50256, 50257 # eot is <|endoftext|>, the last id
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    files = { # the hashes pin the vocabulary, so to_dict needs no more than the name
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}

    def paths(self):
        """Where vocab.bpe and encoder.json lie. tiktoken's own download would have no timeout."""
        files = self.files.items()
        return [fetch(self.address + file, file, sha256, self.data_dir) for file, sha256 in files]

    def to_hf(self):
        bpe, vocab = (path.read_text(encoding="utf-8") for path in self.paths())
        merges = [tuple(pair.split(" ")) for pair in bpe.split("\n")[1:-1]] # the first line is a version
        return bpe_json(json.loads(vocab), merges, ["<|endoftext|>"], in_words=True)

    @cached_property
    def codec(self):
        tiktoken, public = package("tiktoken"), package("tiktoken_ext.openai_public")
        os.environ["TIKTOKEN_CACHE_DIR"] = "" # no copies of the files elsewhere
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*map(str, self.paths()))
        return tiktoken.Encoding("gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": self.eot})

    def encode(self, text):
        # Nothing is disallowed: "<|endoftext|>" in a document is text, neither separator nor error.
        return self.codec.encode_to_numpy(without_surrogates(text), disallowed_special=()).astype("<u2")

    def cut(self, text):
        # No token of GPT-2's pattern holds a visible character and a space or newline behind it.
        found = re.search(r"[ \n]\S", text[::-1])
        return len(text) - 1 - found.start() if found else 0

    def decode(self, ids):
        return self.codec.decode(self.checked(ids).tolist())

    def bytes_of(self, ids):
        return len(self.codec.decode_bytes(ids.tolist()))


class HFTokenizer(Tokenizer):
    """Hugging Face's `tokenizers`, from the text of a JSON file. Special tokens in a text are text."""
    name = "hf"

    def __init__(self, text: str, data_dir: str = "data"):
        self.text, saved = text, json.loads(text) # kept whole: only encode and decode import the package
        vocab = saved["model"]["vocab"] # a table of ids, or Unigram's list of (piece, score)
        known = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        known |= {token["content"]: token["id"] for token in saved.get("added_tokens") or []}
        self.vocab_size = max(known.values()) + 1 # not the number of ids, which may have holes
        ends = [end for end in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>") if end in known]
        self.eot = known[ends[0]] if ends else None
        self.unk = saved["model"].get("unk_id", known.get(saved["model"].get("unk_token")))
        self.of_bytes = (saved.get("decoder") or {}).get("type") == "ByteLevel" # each letter shows one byte

    def to_dict(self):
        return {"name": self.name, "json": self.text}

    def to_hf(self):
        return self.text

    def is_gpt2(self) -> bool:
        """Whether this is GPT-2's: its merges make the file that GPT2Tokenizer fetches."""
        merges = json.loads(self.text)["model"].get("merges") or []
        lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in merges), ""]
        same = hashlib.sha256("\n".join(lines).encode()).hexdigest() == GPT2Tokenizer.files["vocab.bpe"]
        return same and (self.vocab_size, self.eot) == (GPT2Tokenizer.vocab_size, GPT2Tokenizer.eot)

    @cached_property
    def codec(self):
        tokenizers = package("tokenizers")
        try:
            codec = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error: # the package raises no class of its own
            raise UserError(f"tokenizers {tokenizers.__version__} cannot read this file: {error}") from error
        codec.no_truncation() # what a file says of batches has no place in training data
        codec.no_padding()
        codec.encode_special_tokens = True # "<|endoftext|>" in a document must not become the separator
        return codec

    def unknown(self, text):
        """Characters that become <UNK> or nothing. Spaces do not count: many tokenizers drop them."""
        ids = {char: self.encode(char).tolist() for char in sorted(set(text)) if not char.isspace()}
        return [char for char in ids if not ids[char] or self.unk in ids[char]]

    def encode(self, text):
        # "fast" leaves out the characters' offsets, which would double the time.
        found = self.codec.encode_batch_fast([without_surrogates(text)], add_special_tokens=False)[0]
        return np.array(found.ids, token_type(self.vocab_size))

    def cut(self, text):
        # No rule holds for every file, so each place is tried with the 100 characters on both sides.
        for found in itertools.islice(re.finditer(r"[ \n]\S", text[:-100][::-1]), 10):
            at = len(text) - 101 - found.start()
            left, right = text[max(at - 100, 0):at], text[at:at + 100]
            if [*self.encode(left), *self.encode(right)] == self.encode(left + right).tolist():
                return at
        return 0

    def decode(self, ids):
        return self.codec.decode(self.checked(ids).tolist(), skip_special_tokens=False)

    def bytes_of(self, ids):
        pieces = map(self.codec.id_to_token, ids.tolist())
        return sum(map(len, filter(None, pieces))) if self.of_bytes else super().bytes_of(ids)


def bpe_json(vocab, merges=(), special=(), unk_token=None, of_bytes=True, in_words=False):
    """The text of a tokenizer.json. of_bytes: the smallest piece is a byte, not a character. in_words: merges
    stay inside the words of GPT-2's pattern.
    """
    hf = package("tokenizers", "a tokenizer.json")
    made = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[*merges], unk_token=unk_token))
    made.decoder = hf.decoders.ByteLevel() if of_bytes else hf.decoders.Fuse()
    if of_bytes:
        made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=in_words)
    made.add_special_tokens([*special])
    return made.to_str()


TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, AsciiTokenizer, GPT2Tokenizer, ByteTokenizer)}


def tokenizer_from_dict(d: dict, data_dir: str = "data") -> Tokenizer:
    """The tokenizer of to_dict, or of a bare {"char_to_id", "id_to_char"}. UserError for all else."""
    try:
        if d.get("name") == "hf":
            return HFTokenizer(d["json"], data_dir)
        name = d["name"] if "name" in d else "ascii" if "<UNK>" in d["char_to_id"] else "char"
        return TOKENIZERS[name](d.get("char_to_id"), data_dir)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"not a saved tokenizer ({error}): it needs a name ({', '.join(TOKENIZERS)}) or "
                        "char_to_id,\nor to be a tokenizer.json of Hugging Face's tokenizers") from error


def make_tokenizer(name: str, text_chars, data_dir: str = "data") -> Tokenizer:
    """The tokenizer called name for a text of these characters. name may be a FILE.json or meta.json."""
    if name == "char": # nanoGPT's vocabulary: the sorted characters of the text
        return CharTokenizer({char: i for i, char in enumerate(sorted(set(text_chars)))})
    if name in TOKENIZERS:
        return TOKENIZERS[name](None, data_dir)
    if not name.endswith(".json") or not os.path.isfile(name):
        raise UserError(f"no tokenizer {name!r}: choose {', '.join(TOKENIZERS)}, or a saved FILE.json")
    try:
        saved = json.loads(text := "".join(read_text(name)))
        if isinstance(saved, dict) and isinstance(saved.get("model"), dict): # Hugging Face's
            saved = {"name": "hf", "json": text}
        elif isinstance(saved, dict) and "tokenizer" in saved: # the meta.json of another dataset
            saved = saved["tokenizer"]
        return tokenizer_from_dict(saved, data_dir)
    except (ValueError, RecursionError) as error: # no JSON, or a UserError of the lines above
        raise UserError(f"{name}: {error}") from error


def package(name, what="this tokenizer", kind=UserError):
    """The imported package. Only who chooses what needs it must have it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise kind(f"{what} needs a package: pip install {name.removesuffix('.parquet')}") from error


def without_surrogates(text):
    """text with U+FFFD for each lone surrogate, as tiktoken's own encode has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def token_type(vocab_size):
    return "<u2" if vocab_size <= 65536 else "<u4" # little-endian, 2 or 4 bytes for each token


# --- files: hashes, locks, downloads ---
def listed(names, limit: int = 10) -> str:
    """The names with commas between them, and how many more there are than limit."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def hash_of_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def sha256_of(path) -> str:
    digest = hashlib.sha256() # piece by piece: a shard has 200 MB
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def has_hash(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


@contextmanager
def alone(path: Path):
    """One process or thread at a time makes path, the others wait. A full disk or the like is a UserError."""
    lock, file, held = path.with_name(f".{path.name}.lock"), None, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while fcntl and not held:
            try:
                file = open(lock, "ab")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) # NB raises where it would wait
            except BlockingIOError:
                print(f"{path} is being made by another process: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError: # a read-only folder: nobody waits
                break
            # The process before may have deleted the file locked here: another one is the lock now.
            with suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}\n"
                        "free some space, or choose another --data_dir") from error
    finally:
        if held: # not where Ctrl-C ended the waiting: the lock is another process's
            lock.unlink(missing_ok=True)
        if file:
            file.close()


class DownloadError(UserError):
    """A file could not be had. Says from where, why, and what to do without a network."""


class Hopeless(requests.RequestException):
    """A request that would fail again in the next minutes."""


def fetch(url: str, filename: str, sha256: str, data_dir: str = "data", size: int = 2 ** 27) -> Path:
    """The path of filename in data_dir: it lies there, or in the folder DATA_MIRROR, or is downloaded."""
    target, named = Path(data_dir) / filename, re.fullmatch(r"\w[\w.-]{0,100}", filename, re.ASCII)
    if named and has_hash(target, sha256): # perhaps through a link
        return target
    if not named or target.resolve().parent != Path(data_dir).resolve():
        raise UserError(f"{filename!r} is not the name of a file inside {data_dir}/: nothing was downloaded")
    part = target.with_name(filename + ".part") # what came so far; the next call continues it
    mirrored = Path(os.environ.get("DATA_MIRROR") or data_dir) / filename # no mirror: target itself
    with alone(target):
        if has_hash(target, sha256): # another process got it while this one waited
            return target
        if target.exists(): # perhaps a text that a person has edited
            raise UserError(f"{target} has sha256 {sha256_of(target)}, expected {sha256}\n"
                            "delete it to get it anew, or rename it and prepare it by its path")
        if has_hash(mirrored, sha256):
            shutil.copyfile(mirrored, part) # first to part: a copy may be interrupted too
        elif mirrored.exists():
            print(f"{mirrored} is not used: its sha256 is not {sha256}", file=sys.stderr)
        if not has_hash(part, sha256): # it may be whole: an earlier process was killed after the last byte
            deadline = time.monotonic() + _DEADLINE + max(size - 2 ** 27 >> 20, 0) # 1 MB/s beyond 128 MB
            persist(partial(download, url, part, sha256, size, deadline), deadline, url,
                    f"put {filename} into {data_dir}/ or set DATA_MIRROR to a folder that has it, "
                    f"with sha256 {sha256[:12]}...")
        os.replace(part, target) # whoever finds the file under its full name finds all of it
    return target


def persist(attempt, deadline, url, way_out):
    """What attempt() returns. Called until it works, three times at most; then a DownloadError."""
    for pause in (0.5, 1, None): # seconds before the next attempt
        try:
            return attempt()
        except FAILURES as error:
            problem, wait = diagnosis(error)
        if None in (wait, pause) or time.monotonic() + wait > deadline:
            raise DownloadError(f"could not download {url}\n{problem}\n{way_out}")
        if wait > 5:
            print(f"{problem}: waiting {wait} seconds, as it asks", file=sys.stderr)
        time.sleep(wait or pause)


def diagnosis(error):
    """(problem, seconds to wait before the next attempt; 0: the usual, None: it would be in vain)."""
    # These messages nest several objects. The last one says what a person needs.
    problem = " ".join(str(error).split("): ")[-1].strip("\"'()").split())[:160] or type(error).__name__
    if (response := getattr(error, "response", None)) is None:
        return problem, None if isinstance(error, Hopeless) or "resolve" in problem else 0 # no such host
    limits = re.findall(r";t=(\d+)", response.headers.get("RateLimit", "")) # as in "api";r=0;t=55
    asked = response.headers.get("Retry-After") or "".join(limits[:1])
    wait = int(asked) if asked.isdigit() else 0 # a date, its other form, is rare
    passes = response.status_code == 429 or response.status_code >= 500 # what is 404 now stays 404
    return problem, wait if passes and wait <= _PATIENCE else None


def download(url, part, sha256, most, deadline):
    """Gets url into the file part, from where an earlier call stopped. Raises one of FAILURES."""
    while True:
        have, problem = part.stat().st_size if part.exists() else 0, None
        try:
            with ask("GET", url, **({"Range": f"bytes={have}-"} if have else {})) as response:
                # 200: all of it, whatever was asked for. 416: our bytes were not the start of the file.
                with open(part, "ab" if response.status_code == 206 else "wb") as file:
                    # read1 does not wait for a full block, so a server that trickles meets the deadline.
                    while block := response.raw.read1(2 ** 16, decode_content=False):
                        file.write(block)
                        if file.tell() > most:
                            raise Hopeless(f"more than the expected {most:,} bytes came")
                        if time.monotonic() > deadline:
                            raise Hopeless("it took more seconds than it may; the next call continues")
        except FAILURES as error:
            problem = error
        size = part.stat().st_size if part.exists() else 0
        if has_hash(part, sha256): # only the bytes count, whatever the server said about their number
            return print(f"{part.stem}: {size:,} bytes from {url}", file=sys.stderr)
        if not problem: # all came, and it is wrong: there is nothing to continue
            found = sha256_of(part)
            part.unlink()
            raise requests.RequestException(
                f"the {size:,} bytes that came have sha256 {found[:12]}..., expected {sha256[:12]}...")
        if isinstance(problem, Hopeless) or size < have + 2 ** 20: # else it goes on at once
            raise problem


def endpoint() -> str:
    """Address of Hugging Face's hub, or of the mirror that HF_ENDPOINT names: the hub's own convention."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def ask(method, url, **headers):
    """The response to a request. Only the hub gets HF_TOKEN: requests drops it where another host goes on."""
    if url.startswith(endpoint() + "/"):
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise Hopeless("HF_HUB_OFFLINE is set, so nobody was asked")
        token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch("[!-~]*", token): # requests would show it in its error
            raise Hopeless("HF_TOKEN has characters that no token has, so nobody was asked")
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
    # identity, because a range counts the bytes of the file itself
    response = requests.request(method, url, headers={"Accept-Encoding": "identity", **headers}, stream=True,
                                timeout=_TIMEOUT, allow_redirects=method == "GET")
    if response.status_code >= 400 and response.status_code != 416:
        response.close()
        problem = f"the server answered {response.status_code} {response.reason}"
        raise requests.HTTPError(problem, response=response)
    return response


def hub_file(repo, revision, path, data_dir, kind="datasets/") -> Path:
    """The path of a file on Hugging Face's hub: downloaded, with the sha256 given there. kind "": a model."""
    url, found = f"{endpoint()}/{kind}{repo}/resolve/{revision}/{path}", []
    # One flat name. C4's .json are .jsonl. A .bin among the datasets would make their folder look like one.
    filename = f"{repo.split('/')[1]}-{path}".replace("/", "-").replace(".json.", ".jsonl.")
    filename = filename.replace(".bin", ".tokens")
    note = Path(data_dir) / f"{filename}.sha256" # so that a file that is there needs no network

    def attempt():
        with ask("HEAD", url) as response: # the headers are of the file itself, wherever the hub redirects to
            told = [response.headers.get(key, "").strip('"') for key in ("X-Linked-ETag", "X-Linked-Size")]
        if not re.fullmatch("[0-9a-f]{64} [0-9]+", " ".join(told)):
            raise Hopeless("the server does not tell its sha256 and size")
        return told

    for folder in (os.environ.get("DATA_MIRROR") or data_dir, data_dir):
        with suppress(OSError, UnicodeDecodeError):
            found = (Path(folder) / note.name).read_text().split()
    if found[2:] != [revision]:
        way_out = f"put {filename} and {note.name} into {data_dir}/, from a machine that has them"
        found = persist(attempt, time.monotonic() + _DEADLINE, url, way_out)
        with alone(note):
            note.write_text(" ".join([*found, revision]))
    return fetch(url, filename, found[0], data_dir, int(found[1]))


# --- sources: where the text comes from ---
# A stream is the text of a file: pieces of a document (str), and None where a document ends. A source is a
# function: files(first=n) yields the streams of its files from number n on. It is called twice, because a
# text is measured before it is encoded, or with a higher n, to go on where an earlier call has stopped.
def one_file(stream):
    """The source of a single file: stream() starts its stream."""
    return lambda first=0: iter([stream()][first:])


def joined(files):
    """The stream of all files."""
    return itertools.chain.from_iterable(files())


def blocks(path):
    """Yields the bytes of a file in pieces, those of a .gz or .zst unpacked."""
    path, size, errors = Path(path), 0, (OSError, EOFError, zlib.error)
    unpack = gzip.open if path.suffix == ".gz" else lambda file: file
    if path.suffix == ".zst":
        zstd = package("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "a .zst file")
        unpack, errors = zstd.open, (*errors, zstd.ZstdError)
    try:
        with open(path, "rb") as file: # reading as text would turn \r\n into \n
            for raw in iter(partial(unpack(file).read, _PIECE), b""):
                size += len(raw)
                if size > max(_LONGEST, _RATIO * file.tell()):
                    raise UserError(f"{path} unpacks to more than {_RATIO} times its size, as no text does\n"
                                    "if you trust it, unpack it first")
                yield raw
    except errors as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', '') or error}") from error


@cache
def say_once(words):
    with suppress(OSError): # nobody may read stdout any more: a run on a stream goes on
        print(words, flush=True)


def read_text(path):
    """Yields the text of a file in UTF-8, or UTF-16 with a byte order mark, in pieces: without the mark, line
    ends as they are. UserError for all else.
    """
    size = 0
    for raw in itertools.chain(blocks(path), [b""]):
        if not size:
            kind = encoding_of(path, raw)
            decoder = codecs.getincrementaldecoder(kind)()
        begin = size - len(decoder.getstate()[0])
        try:
            text, size = decoder.decode(raw, not raw), size + len(raw)
        except UnicodeDecodeError as error:
            what = f"byte 0x{error.object[error.start]:02x} at offset {begin + error.start}"
            if kind == "utf-16":
                raise UserError(f"{path} begins as UTF-16 does, but is damaged: {what}\nget it again")
            # Latin-1 has no letters from 0x80 to 0x9f, and Windows' own encoding of the same languages has.
            likely = "windows-1252" if re.search(b"[\x80-\x9f]", raw) else "latin1"
            raise not_utf8(path, what, likely)
        yield text if begin else text.removeprefix("\ufeff")


def not_utf8(path, what, likely):
    return UserError(f"{path} is not UTF-8: {what}\nif it is {likely}: iconv -f {likely} -t utf-8 OLD > NEW")


def encoding_of(path, raw):
    """utf-8 or utf-16, by the first piece of a file. UserError if it is no text, or UTF-16 without a mark."""
    for first, what in FIRST_BYTES.items():
        if raw.startswith(first):
            raise UserError(f"{path} is {what}")
    # Latin letters in UTF-16: most bytes at even offsets are zero and none at odd offsets, or the reverse.
    even, odd = raw[::2].count(0), raw[1::2].count(0)
    is_wide = min(even, odd) < 0.05 * len(raw) and max(even, odd) > 0.4 * len(raw)
    kind, letters = "utf-8", raw.replace(b"\0", b"") if is_wide else raw # token shards look wide, too
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        kind, letters = "utf-16", raw.decode("utf-16", "replace").encode()
    if len(letters.translate(None, CONTROLS)) < 0.99 * len(letters):
        raise UserError(f"{path} is no text: more than one byte in a hundred is a control character")
    if kind == "utf-16":
        say_once(f"{path} is UTF-16 and is decoded")
    elif is_wide:
        raise not_utf8(path, "every second byte is zero", "utf-16be" if even > odd else "utf-16le")
    return kind


def read_lines(path, end="\n"):
    """Yields (number, line) of a text file. UserError for a line that would fill the memory."""
    held, number = "", 0
    for text in itertools.chain(read_text(path), [end]):
        new, held = held[1 - len(end) or len(held):] + text, held + text
        if end in new: # searching all that is held at each piece would take long
            *lines, held = held.split(end) # splitlines would cut at U+2028
            for number, line in enumerate(lines, number + 1):
                yield number, line
        if len(held) > _LONGEST:
            raise UserError(f"{path} line {number + 1} has more than {_LONGEST:,} characters\n"
                            "divide it into several documents, each with its own line")


def unpacked(path: Path) -> Path:
    """a.txt for a.txt.gz: the name that tells what the file holds."""
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


def json_rows(path, field):
    """Yields (line number, value) of a .jsonl. csv_rows and parquet_rows do so for their files."""
    for number, line in read_lines(path):
        try:
            if line.strip():
                yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error


def csv_rows(path, field):
    csv.field_size_limit(_LONGEST)
    rows = csv.DictReader((line + "\n" for _, line in read_lines(path)), strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} is not CSV: {error}") from error


def parquet_rows(path, field):
    parquet = package("pyarrow.parquet", "a .parquet file")
    try:
        file = parquet.ParquetFile(path)
        columns = [field] if field in file.schema_arrow.names else None # None: all, which the refusal names
        batches = file.iter_batches(64, columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except Exception as error: # the package raises many kinds
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged or no .parquet file: {reason}") from error


ROWS = {".jsonl": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def read_file(path: Path, field: str = ""):
    """The stream of one file: the field of every row of a .jsonl, .csv or .parquet, else the text as one."""
    if is_part(path):
        raise UserError(f"{path} is part of a dataset, not text: name its folder, {path.parent}")
    kind = unpacked(path).suffix
    if kind not in ROWS or kind == ".csv" and not field:
        yield from read_text(path)
        return
    field = field or "text"
    for number, row in ROWS[kind](path, field):
        try:
            yield row[field] + "" # + "": no text, a TypeError
        except (KeyError, TypeError) as error:
            keys = f", only {listed(row)}: choose one with --field" if isinstance(row, dict) else ""
            raise UserError(f'{path} line {number} has no text, as in {{"{field}": "..."}}{keys}') from error
        yield None


def files_below(folder: Path):
    """[(path from folder, path)] of all files below folder, sorted. Hidden files do not count."""
    found = [(path.relative_to(folder), path) for path in folder.rglob("*") if not path.is_dir()]
    found = [(short, path) for short, path in found if not any(part.startswith(".") for part in short.parts)]
    return sorted(found, key=lambda pair: pair[0].as_posix())


def read_folder(folder: Path, field: str = ""):
    """The documents of all text files below folder, sorted by path."""
    files, damaged, left_out = [], [], []
    for short, path in files_below(folder):
        try:
            deque(read_file(path, field), maxlen=0) # reads all: damage may be at the end
            files.append(path)
        except UserError as error:
            meant = unpacked(short).suffix in TEXTS
            (damaged if meant else left_out).append(str(error).splitlines()[0] if meant else short.name)
    if left_out:
        print(f"left out, because they are no text in UTF-8: {listed(left_out)}")
    if damaged and files: # meant as text, so a person must know
        print(f"{len(damaged)} OF {len(damaged) + len(files)} TEXTS LEFT OUT:", *damaged[:10], sep="\n    ")
    if not files:
        none = f"{folder} has no text files: put .txt, .md, .py or .jsonl files there"
        raise UserError(damaged[0] if damaged else none)
    return lambda first=0: (itertools.chain(read_file(path, field), [None]) for path in files[first:])


def shakespeare(data_dir):
    """TinyShakespeare: 1,115,394 characters of his plays, which nanoGPT trains on (a download of 1.1 MB)"""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    return url, one_file(partial(read_text, fetch(url, "tinyshakespeare.txt", sha256, data_dir)))


def pystdlib(data_dir):
    """Python's own standard library, cut to TinyShakespeare's length to compare with it (no network)"""
    raw = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    text = b"".join(part for part in raw if part.isascii()).decode("ascii").replace("\r\n", "\n")[:1_115_394]
    if len(text) < 1_115_394:
        raise UserError("this Python has no readable standard library: prepare a text of your own instead")
    return f"the standard library of Python {sys.version.split()[0]}", [text]


def recall(data_dir):
    """1,024 lines of 511 pairs such as a3c5a3, each line with its own digit for each letter (no network)"""
    rng, lines = random.Random(0), [] # only random() is the same in every Python
    for _ in range(1024):
        digit = {letter: int(10 * rng.random()) for letter in "abcdefgh"}
        letters = ("abcdefgh"[int(8 * rng.random())] for _ in range(511))
        lines.append("".join(f"{letter}{digit[letter]}" for letter in letters) + ".") # 1,024 with its newline
    return "made by data.py", lines


def needle_line(rng, n, length):
    """`length` characters: n keys of two letters are told with a digit each, then asked again and again."""
    keys = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    told = [f"{key}{int(10 * rng.random())}" for key in sorted(keys, key=lambda _: rng.random())[:n]]
    while 3 * len(told) <= length - 3: # shuffle() is not the same in every Python, but random() is
        told += sorted(told[:n], key=lambda _: rng.random())
    return "".join(told)[: length // 3 * 3].ljust(length, ".")


def needles(data_dir, length):
    """lines such as qd7xa2xa2qd7, of 256 (512, 1,024) characters: keys are told, then asked (no network)"""
    rng, sizes = random.Random(0), [2**i for i in range(2, 9) if 6 * 2**i < length] # few keys teach the task
    lines = [needle_line(rng, sizes[i % len(sizes)], length - 1) for i in range(1_310_720 // length)]
    return "made by data.py", lines


# --- corpora on Hugging Face's hub: each a fixed revision, downloaded file by file as tokens are needed ---
# Tried against a server that plays the hub, not against the hub itself with its redirects.
def hub_files(repo, revision, data_dir, read, path, numbers=(0,), first=0):
    """Yields the streams of the files that path names with these numbers in it."""
    if path.endswith(".parquet"): # a DownloadError, so that train.py may take its offline_dataset
        package("pyarrow.parquet", repo, DownloadError)
    for number in numbers[first:]:
        yield read(hub_file(repo, revision, path.format(number), data_dir))


def read_stories(path):
    """The stream of a text that has <|endoftext|> between its documents."""
    for _, story in read_lines(path, "<|endoftext|>"):
        yield from (story.strip(), None)


def tinystories(data_dir):
    """TinyStories: short stories by GPT-4 in the words of a small child (a download of 2.2 GB)"""
    files = "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", data_dir, read_stories
    return (files[:2], partial(hub_files, *files, "TinyStoriesV2-GPT4-train.txt"),
            partial(hub_files, *files, "TinyStoriesV2-GPT4-valid.txt"))


def c4(data_dir):
    """C4: pages of the English web (downloads of 320 MB, one for about 170 million tokens)"""
    files = "allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", data_dir, read_file
    return (files[:2], partial(hub_files, *files, "en/c4-train.{:05d}-of-01024.json.gz", range(1024)),
            partial(hub_files, *files, "en/c4-validation.{:05d}-of-00008.json.gz", range(8)))


def fineweb(data_dir):
    """FineWeb: pages of the English web as 10 billion ids of GPT-2 (200 MB for every 100 million)"""
    files = "kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c", data_dir, read_ids
    return (files[:2], partial(hub_files, *files, "fineweb_train_{:06d}.bin", range(1, 104)),
            partial(hub_files, *files, "fineweb_val_{:06d}.bin"))


def read_ids(path):
    """The stream of a shard of GPT-2's ids: arrays, which are encoded already, the ends of documents too."""
    if (top := highest(ids := open_shard(path))) >= GPT2Tokenizer.vocab_size:
        raise damaged(path, f"id {top} found, expected ids below {GPT2Tokenizer.vocab_size}")
    for start in range(0, len(ids), _PIECE):
        yield ids[start:start + _PIECE]


def wikipedia(data_dir):
    """Wikipedia: English articles of November 2023 (needs pyarrow)"""
    files = "wikimedia/wikipedia", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", data_dir, read_file
    path = "20231101.en/train-{:05d}-of-00041.parquet"
    return files[:2], partial(hub_files, *files, path, range(40)), partial(hub_files, *files, path, [40])


def wikitext(data_dir, config="wikitext-2-raw-v1", count=1):
    """WikiText: good articles of Wikipedia, 2 million tokens (needs pyarrow; wikitext103: 118 million)"""
    files = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", data_dir, read_file
    parts = ((f"{config}/train-{{:05d}}-of-{count:05d}.parquet", range(count)),
             (f"{config}/validation-{{:05d}}-of-00001.parquet", [0]))
    # A file may end inside an article, so all of them are one file here.
    return files[:2], *(one_file(lambda part=part: articles(joined(partial(hub_files, *files, *part))))
                        for part in parts)


def articles(rows):
    """WikiText has one row a paragraph: documents end where a title begins, as in " = Title = \\n"."""
    for text in filter(None, rows):
        if re.match(r" = [^=].* = \n$", text):
            yield None
        yield text


NEEDLES = {"needles": 256, "needles_512": 512, "needles_1024": 1024} # characters of a line
DATASETS = {"shakespeare": shakespeare, "pystdlib": pystdlib, "recall": recall,
            **{name: partial(needles, length=length) for name, length in NEEDLES.items()},
            "tinystories": tinystories, "c4": c4, "fineweb": fineweb, "wikipedia": wikipedia,
            "wikitext": wikitext, "wikitext103": partial(wikitext, config="wikitext-103-raw-v1", count=2)}
CORPORA = {"tinystories": 0, "c4": 10 ** 8, "fineweb": 10 ** 8, "wikipedia": 10 ** 8, "wikitext": 0,
           "wikitext103": 0} # those on the hub -> most tokens without --max_tokens, 0: all


def dataset_name(stem: str) -> str:
    """stem as a folder name: letters of any script, digits and . _ - only, so that it leads nowhere else."""
    return re.sub(r"[^\w.-]+", "_", stem).strip("._-")[:100] or "text"


def own_name(source, name=""):
    """name, else the source's own name. UserError for the name of another known dataset."""
    path = Path(os.path.abspath(source)) # so that "." has a name
    own = source if source in DATASETS else dataset_name(path.name if path.is_dir() else unpacked(path).stem)
    name = name or own
    if name != dataset_name(name):
        raise UserError(f"--name={name} cannot be the name of a folder, as {dataset_name(name)} can")
    if name in DATASETS and source != name: # --dataset=shakespeare must mean one text
        raise UserError(f"{path} would take the name of a known dataset\ntry --name=my_{name}")
    return name


def read_source(source, data_dir, field=""):
    """(origin, files, maybe files for validation) of a source. UserError if there is none."""
    if field and not os.path.isdir(source) and unpacked(Path(source)).suffix not in ROWS:
        raise UserError(f"{source} has no fields: drop --field, which is for {listed(ROWS)}")
    if source in DATASETS:
        origin, files, *own = DATASETS[source](data_dir)
        documents = lambda: itertools.chain.from_iterable((text, None) for text in files)
        return origin, one_file(documents) if isinstance(files, list) else files, *own
    if is_dataset(source) or not os.path.exists(source) and find(source, data_dir):
        raise UserError(f"{source} is a prepared dataset, not text: python train.py --dataset={source}")
    if os.path.isdir(source):
        return os.path.abspath(source), read_folder(Path(source), field)
    if os.path.isfile(source):
        return os.path.abspath(source), one_file(partial(read_file, Path(source), field))
    if os.path.exists(source):
        raise UserError(f"{source} is no file, and a text is read twice: write it into a file first")
    beside = Path(source).parent.glob("[!._]*") # where source would lie; [!._]: no hidden or private names
    beside = [str(path) for path in beside if path.is_dir() or path.suffix in TEXTS]
    near = difflib.get_close_matches(source, [*DATASETS, *prepared(data_dir), *beside], n=3)
    raise UserError(f"no text file, folder or known dataset {source!r}\n"
                    f"{'nearest' if near else 'known'}: {listed(near or DATASETS, limit=20)}")


# --- shard_*.npy of other programs: arrays of rows, where a row is a sequence by itself ---
def npy_files(folder):
    """The shards in a folder, shard_2 before shard_10; none in anything else."""
    found = Path(folder).glob("shard_*.npy") if os.path.isdir(folder) and folder not in DATASETS else ()
    return sorted(found, key=lambda path: (len(path.name), path.name))


def open_npy(path: Path) -> np.ndarray:
    """The rows of a file, (rows, length), as a memory map. UserError if it is damaged or holds no ids."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False) # a pickle may run any code
        what = f"{rows.dtype} of shape {rows.shape}" # an archive of several arrays has neither
    except Exception as error: # a bad header raises many kinds, tokenize.TokenError among them
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged or no .npy file: {reason}\nfetch it again, or move it") from error
    if rows.ndim != 2 or rows.dtype.kind not in "iu" or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise UserError(f"{path} has {what}, expected rows of ids: integers of shape (rows, 2 or more)")
    return rows


def row_shards(files, first, last):
    """Yields (arrays of ids, length of a row, None) of each shard for the rows first to last of all files."""
    for rows in map(open_npy, files):
        n, length = rows.shape
        step = max(1, _SHARD // length) # rows of one shard; a row longer than a shard is one by itself
        some = max(1, _PIECE // length)
        for start in range(max(first, 0), min(last, n), step):
            end = min(start + step, last, n)
            yield (rows[i:min(i + some, end)].reshape(-1) for i in range(start, end, some)), length, None
        first, last = first - n, last - n # counted from the start of the next file


# --- shards: what a dataset consists of ---
def damaged(path, what) -> UserError:
    return UserError(f"{path}: {what}\nrestore it, or prepare the dataset again with data.py prepare SOURCE")


def split_of(file: str) -> str | None:
    """The split of a shard by the word train or val in its name; None if it has neither word, or both."""
    found = set(re.findall("(?<![a-z])(train|val)(?:ing|id|idation)?(?![a-z])", file.lower()))
    return found.pop() if len(found) == 1 else None # strain.bin and oval.bin have neither word


def is_part(path: Path) -> bool:
    """Whether a file is a shard or the meta.json of a dataset, damaged or not: never text."""
    if path.name != "meta.json":
        return path.suffix == ".bin" and split_of(path.name) is not None or path.match("shard_*.npy")
    with suppress(OSError): # texts may have another file of that name
        raw = path.read_bytes()
        return all(key in raw for key in (b'"format"', b'"tokenizer"', b'"shards"'))
    return False


def is_dataset(folder) -> bool:
    """Whether a folder has training shards, or the meta.json of a dataset."""
    if not os.path.isdir(folder):
        return False
    found = {split_of(path.name) for path in Path(folder).glob("*.bin")}
    return "train" in found or is_part(Path(folder) / "meta.json")


def prepared(data_dir) -> list[str]:
    """The names of the datasets in data_dir."""
    return sorted(path.name for path in Path(data_dir).glob("[!.]*") if is_dataset(path))


def find(name: str, data_dir: str = "data") -> Path | None:
    """The folder of a prepared dataset, given by its name in data_dir or by its path, or None."""
    path = Path(os.path.abspath(name)) # so that data/../data/NAME/ is data/NAME
    named = Path(data_dir) / path.name
    places = [named] if name == path.name or path == Path(os.path.abspath(named)) else []
    places += [path] if name not in DATASETS else [] # a bare name is looked for in data_dir first
    return next((folder for folder in places if name and is_dataset(folder)), None)


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """The ids of a shard, (N,), as a memory map. Checks size and header, and N if tokens has it."""
    if not path.is_file():
        raise damaged(path, f"missing, expected a file of {tokens} tokens")
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic, version, count = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    width = WIDTHS.get((magic, version))
    # A file that no meta.json describes may lack the header, as nanoGPT's do. GPT-2's ids never look like a
    # header: the first would be 55,432 of 50,257.
    if width is None and tokens is None:
        if size == 0 or size % 2:
            raise damaged(path, f"{size} bytes, expected 2 for each token (it has no header, as in nanoGPT)")
        return np.memmap(path, "<u2", "r")
    if width is None:
        raise damaged(path, f"starts with {magic}, {version}, expected one of {listed(map(str, WIDTHS))}")
    if count < 0 or tokens not in (None, count):
        expected = "0 or more" if tokens is None else tokens
        raise damaged(path, f"the header counts {count} tokens, expected {expected}")
    if size != (expected := _HEADER + count * np.dtype(width).itemsize):
        raise damaged(path, f"{size} bytes, expected {expected} for {count} tokens")
    return np.memmap(path, width, "r", offset=_HEADER, shape=(count,))


def highest(shard) -> int:
    """The highest id in a shard, -1 if it is empty. Reads 16M ids at a time."""
    return max((int(shard[k:k + 2 ** 24].max()) for k in range(0, len(shard), 2 ** 24)), default=-1)


def read_meta(folder: Path) -> dict:
    """meta.json, which carries its own hash. For a folder without it, of nanoGPT or llm.c, a guess."""
    path = folder / "meta.json"
    if not path.exists():
        return guess_meta(folder)
    try:
        meta = json.loads(path.read_bytes())
        intact = hash_of_json({key: meta[key] for key in meta if key != "sha256"}) == meta.get("sha256")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(path, f"cannot be read ({error})") from error
    if meta.get("format") != _FORMAT:
        raise damaged(path, f"has format {meta.get('format')!r}, expected {_FORMAT}")
    if not intact:
        raise damaged(path, "does not match the sha256 in it: it was damaged or edited")
    return meta


def guess_meta(folder):
    """As read_meta. Prints what it assumed, since a wrong guess would show only in the samples."""
    files = sorted(path.name for path in folder.glob("*.bin"))
    shards = {file: open_shard(folder / file) for file in files if split_of(file)}
    if "train" not in map(split_of, shards):
        raise UserError(f"{folder} has neither meta.json nor train.bin: python data.py prepare SOURCE")
    if left_out := [file for file in files if file not in shards]:
        print(f"{folder}: left out {listed(left_out)}: a shard has either train or val in its name")
    top = max(highest(shard[:2 ** 20]) for shard in shards.values())
    if top < 256: # bytes or characters: all ids are read, as a rare one may come late
        top = max(map(highest, shards.values()))
    vocab_size, saved = (50257, {"name": "gpt2"}) if top > 255 else (top + 1, None)
    print(f"{folder} has no meta.json: by the highest id, assumed vocab_size={vocab_size} "
          f"and {'the gpt2' if saved else 'no'} tokenizer")
    if (folder / "meta.pkl").exists():
        print("its meta.pkl is a pickle, may run any code, and is not read. To have the tokenizer too:\n"
              f"    python data.py prepare {folder / 'input.txt'}")
    return {"source": {"from": "another program"}, "tokenizer": saved, "vocab_size": vocab_size,
            "shards": {file: {"tokens": len(shard)} for file, shard in shards.items()}}


def load(name: str, data_dir: str = "data") -> "Dataset":
    """Opens a prepared dataset, given by its name or its path. Checks sizes and headers; verify reads all."""
    name = str(name)
    folder = find(name, data_dir) or name == dataset_name(name) and Path(data_dir) / name
    if not folder or not folder.is_dir():
        source = name if name in DATASETS else "shakespeare, or the path of a text"
        raise UserError(f"no dataset {name!r} in {data_dir}/, only: {listed(prepared(data_dir)) or 'none'}\n"
                        f"to make one: python data.py prepare {source}")
    meta, shards, rows = read_meta(folder), {"train": [], "val": []}, {"train": [], "val": []}
    for file, entry in sorted(meta["shards"].items()):
        split = split_of(file)
        if os.path.basename(file) != file or not split:
            raise damaged(folder / "meta.json", f"names the file {file!r}, expected a shard in this folder")
        shards[split].append(open_shard(folder / file, entry["tokens"] if "sha256" in entry else None))
        rows[split].append(entry.get("row", 0)) # 0: the shard is one row
    codec = tokenizer_from_dict(meta["tokenizer"], data_dir) if meta["tokenizer"] else None
    train, val = (Tokens(shards[split], meta["vocab_size"], f"{split} split of {folder.name}", rows[split])
                  for split in shards)
    return Dataset(folder.name, folder, meta, codec, meta["vocab_size"], train, val)


def verify(name: str, data_dir: str = "data") -> list[str]:
    """Reads all of a dataset. Returns a line for each file in order; UserError at the first that is not."""
    dataset, lines = load(name, data_dir), []
    for shard in dataset.train.shards + dataset.val.shards:
        path = dataset.folder / Path(shard.filename).name
        expected, actual = dataset.meta["shards"][path.name].get("sha256"), sha256_of(path)
        if expected not in (None, actual):
            raise damaged(path, f"sha256 is {actual}, expected {expected}")
        if (top := highest(shard)) >= dataset.vocab_size:
            raise damaged(path, f"id {top} found, expected ids below vocab_size={dataset.vocab_size}")
        note = "" if expected else " (none stored)"
        lines.append(f"OK {path}: {len(shard):,} tokens, highest id {top}, sha256 {actual[:12]}{note}")
    return lines


# --- prepare: text -> shards ---
def prepare(source, tokenizer: str = "char", data_dir: str = "data", val_fraction: float = 0.1,
            field: str = "", name: str = "", max_tokens: int = 0) -> Path:
    """Writes source, a known dataset or a path, as shards and meta.json. Returns their folder, data_dir/NAME.

    Goes piece by piece, so that memory does not grow with the text. tokenizer "": the dataset's own, else
    char, of a corpus on the hub gpt2. If interrupted, leaves what was there, and keeps the finished shards:
    the next call with these arguments goes on behind them, to the same bytes.
    """
    source = str(source) # a Path is welcome too
    check_settings(source, tokenizer, val_fraction)
    if max_tokens < 0:
        raise UserError(f"max_tokens={max_tokens} must be at least 0, for all")
    if is_dataset(data_dir) or npy_files(data_dir): # a dataset would be made among the shards of another
        raise UserError(f"--data_dir={data_dir} is a dataset, not a folder of datasets; "
                        f"did you mean --dataset={data_dir}?")
    files = npy_files(source)
    if files and (field or max_tokens):
        raise UserError(f"{source}: shard_*.npy are taken whole, drop --field and --max_tokens")
    origin, *texts = [""] if files else read_source(source, data_dir, field)
    target = Path(data_dir) / own_name(source, name)
    if not tokenizer: # the dataset's own, by its name, or by its file if only that has the vocabulary
        codec = load(os.path.abspath(target)).tokenizer if is_dataset(target) else None
        tokenizer = codec.name if codec else "gpt2" if source in CORPORA else "char"
        tokenizer = tokenizer if tokenizer in TOKENIZERS else str(target / "meta.json")
    if files:
        prepare_rows(target, source, files, tokenizer, val_fraction)
    else:
        prepare_text(target, origin, texts, tokenizer, val_fraction, max_tokens or CORPORA.get(source, 0))
    return target


def check_settings(source, tokenizer, val_fraction):
    """UserError if prepare and stream cannot have them."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must be at least 0 and below 1, say 0.1")
    if source == "fineweb" and tokenizer not in ("gpt2", ""):
        raise UserError("fineweb holds ids of GPT-2, not text: add --tokenizer=gpt2")


class Survey:
    """Measures a text that streams by: its characters, documents, sha256 and alphabet."""
    def __init__(self):
        self.count, self.documents, self.digest = 0, 0, hashlib.sha256()
        self.seen = np.zeros(sys.maxunicode + 1, bool) # (code points,)

    def watch(self, stream, before=None):
        """Yields the stream. UserError in the end if the Survey `before` has seen another text."""
        new = True # whether the next text begins a document
        for text in stream:
            if text:
                self.digest.update(b"\xff" * (new and self.documents > 0)) # 0xff is never in UTF-8
                self.digest.update(text.encode("utf-8", "surrogatepass"))
                self.documents, self.count = self.documents + new, self.count + len(text)
                self.seen[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")] = True
            new = text is None or new and not text
            yield text
        if before and before.digest.digest() != self.digest.digest():
            raise UserError("the text has changed while it was read: prepare it again")

    def chars(self) -> str:
        """The sorted characters, and the newline that stands between documents."""
        self.seen[10] |= self.documents > 1
        return "".join(map(chr, np.flatnonzero(self.seen)))


def prepare_text(target, origin, texts, tokenizer, val_fraction, limit):
    """texts: a source whose end becomes the validation split; or, of a corpus, a source for each split."""
    text, again, most = Survey(), Survey(), limit or 2 ** 62
    most = most, int(most * val_fraction) # tokens of train, and of val
    if len(texts) == 1:
        deque(text.watch(joined(*texts)), maxlen=0)
        if not text.documents:
            raise UserError(f"{origin} is empty: there is no text to prepare")
        about = {"from": origin, "sha256": text.digest.hexdigest(), "documents": text.documents}
        halves = split_at(again.watch(joined(*texts), text), int(text.count * (1 - val_fraction)))
        texts = [one_file(lambda half=half: half) for half in halves]
        share = lambda count: again.count / text.count
    else: # perhaps too large to be read to its end
        about = {"from": "@".join(origin), "sha256": hash_of_json(origin)}
        if tokenizer in ("char", "ascii"): # a character is a token: these are read for the alphabet
            for files, count in zip(texts, most):
                deque(text.watch(split_at(joined(files), count)[0]), maxlen=0)
        share = lambda count: count / limit if limit else 0
    chars = text.chars()
    codec = make_tokenizer(tokenizer, chars, target.parent)
    codec.encode(chars) # a character without an id stops us now, not after an hour of encoding
    splits = [partial(text_shards, *pair, codec, share) for pair in zip(texts, most)]
    done = put(target, about, codec, codec.vocab_size, val_fraction, splits, limit)
    if done and (lost := codec.unknown(chars)):
        print(f"{len(lost)} different characters have no id and became <UNK>: {listed(map(repr, lost))}")


def text_shards(files, most, codec, share, done):
    """Yields (arrays of ids, 0, Ids) of each shard of a text. done, share: see put and reported."""
    before = sum(entry["tokens"] for entry, _ in done)
    ids = Ids(files, codec, done[-1][1] if done else [0, 0, 0], most - before)
    ids.found = reported(ids.found, share, before)
    for number in itertools.count(len(done)):
        if number and not ids.more(): # there is at least one shard
            return
        yield ids.take(_SHARD), 0, ids


def split_at(stream, cut: int):
    """(train, val): the first cut characters of a stream, and its rest. The cut may divide a document."""
    end = object()

    def with_end():
        left = cut
        if not cut:
            yield end
        for text in stream:
            size = len(text or "")
            yield from (text[:left], end, text[left:]) if 0 < left <= size else [text]
            left -= size

    def rest():
        deque(train, maxlen=0) # what --max_tokens left over
        yield from both

    both = with_end()
    train = iter(partial(next, both), end) # asks for no text behind end: that might download a file
    return train, rest()


def divided(stream, codec, ended):
    """Yields a file and its separators: texts, arrays of ids. ended: another file has had a document."""
    separator = "\n" if codec.eot is None else np.array([codec.eot])
    held, begun, enough = "", False, _PIECE
    for text in itertools.chain(stream, [None]):
        if isinstance(text, np.ndarray): # encoded already
            yield text
        elif text is None:
            if held:
                yield held
            held, begun, ended, enough = "", False, begun or ended, _PIECE
        elif text != "":
            if ended:
                yield separator
            held, begun, ended = held + text, True, False
        while len(held) > enough:
            if cut := codec.cut(held):
                yield held[:cut]
            held, enough = held[cut:], _PIECE if cut else 2 * enough # searching all at each piece takes long
        if len(held) > _LONGEST:
            raise UserError(f"{len(held):,} characters have no place where {codec.name} could divide them\n"
                            "put spaces or line ends there, or take --tokenizer=byte")


def encodable(files, codec, start):
    """Yields (place, text or array of ids) from the place `start` on: (number of the file, of its piece)."""
    # Piece 0 is the separator before a file, so that its pieces have these numbers wherever a call begins.
    ended = start[0] > 0
    for file, stream in enumerate(files(first=start[0]), start[0]):
        pieces = 0
        for pieces, text in enumerate(divided(stream, codec, ended), 0 if ended else 1):
            if (file, pieces) >= start:
                yield (file, pieces), text
        ended = ended or pieces > 0


def encode_all(files, codec, start, most):
    """Yields (place of its first text, array of ids), in order, from the place `start` on: see encodable.

    Every core works: tokenizers release Python's lock meanwhile. Reads no more than `most` ids from shards.
    """
    kind, waiting, texts, size = token_type(codec.vocab_size), deque(), [], 0
    encode = lambda place, texts: (place, np.concatenate([
        codec.encode(text) if isinstance(text, str) else text.astype(kind) for text in texts]))
    with ThreadPoolExecutor(_THREADS) as pool:
        for here, text in encodable(files, codec, start):
            place = place if texts else here
            texts.append(text)
            size += len(text)
            most -= len(text) if isinstance(text, np.ndarray) else 0
            if size >= _PIECE:
                waiting.append(pool.submit(encode, place, texts))
                texts, size = [], 0
            if most <= 0: # one more piece might download a file
                break
            if len(waiting) > 2 * _THREADS:
                yield waiting.popleft().result()
        waiting += [pool.submit(encode, place, texts)] if texts else []
        while waiting:
            yield waiting.popleft().result()


class Ids:
    """The ids of a source from a cursor on, `most` of them at most. They do not depend on where a call began.

    cursor: three ints that say where the next id comes from: number of the file, number of the piece in it,
    number of ids from the start of that piece. Opening a source there reads its file again from the start,
    but encodes nothing that lies before.
    """

    def __init__(self, files, codec, cursor=(0, 0, 0), most=2**62):
        *self.place, self.at = cursor # at: number of the next id, from the start of the piece
        self.ids, self.most = np.zeros(0, token_type(codec.vocab_size)), most
        self.found = encode_all(files, codec, tuple(self.place), self.at + most)

    @property
    def cursor(self) -> list[int]:
        return [*self.place, self.at]

    def more(self) -> bool:
        """Whether ids are left. May read and download to find out."""
        while self.most and self.at >= len(self.ids):
            found = next(self.found, None)
            if found is None:
                return False
            self.at -= len(self.ids)
            self.place, self.ids = found
        return self.most > 0

    def take(self, count: int):
        """Yields arrays of the next ids, count in all, or as many as there are."""
        while count > 0 and self.more():
            some = self.ids[self.at:self.at + min(count, self.most)]
            self.at, self.most, count = self.at + len(some), self.most - len(some), count - len(some)
            yield some


def reported(found, share, before):
    """Yields what encode_all has found; tells now and then on stderr how far it is.

    share(tokens so far): the share of the text, 0: unknown. before: tokens that an earlier call has written.
    """
    every, end = (1, "\r") if sys.stderr.isatty() else (60, "\n")
    count, begin, earlier = before, time.monotonic(), share(before)
    for place, ids in found:
        yield place, ids
        count, passed = count + len(ids), time.monotonic() - begin
        if passed > every:
            every, done = passed + (1 if end == "\r" else 60), share(count)
            minutes = passed / 60 * (1 - done) / (done - earlier) if done > earlier else 0
            left = f", {done:.0%}, {minutes:.1f} minutes left" if done else ""
            line = f"{count:,} tokens, {(count - before) / passed:,.0f} a second{left}"
            print(line.ljust(79), end=end, file=sys.stderr, flush=True)


def prepare_rows(target, source, files, tokenizer, val_fraction):
    """Rows stay apart: nothing says that one goes on in the next. The last rows are for validation."""
    if stray := [path.name for path in files if split_of(path.name) == "val"]:
        raise UserError(f"{source}: the last rows of all shards become the validation split, not {stray[0]}\n"
                        "move it elsewhere, or rename it without the word val")
    # char cannot have made such ids and stands for no tokenizer: the vocabulary ends with the highest id.
    codec = make_tokenizer(tokenizer, "", target.parent) if tokenizer != "char" else None
    limit, top, n = codec.vocab_size if codec else 2 ** 32, -1, 0 # ids fit into uint32; n: rows of all files
    for path in files:
        rows = open_npy(path)
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= limit:
            raise UserError(f"{path}: id {min(low, 0) or high} found, expected ids below vocab_size={limit}\n"
                            "name the tokenizer that made the shards, or fetch the file again")
        top, n = max(top, high), n + len(rows)
    cut = int(n * (1 - val_fraction)) # rows for training
    if cut < 1:
        raise UserError(f"{source} has {n} row, and rows are not divided: take more, or --val_fraction=0")
    if codec is None:
        print(f"{source}: assumed vocab_size={top + 1} by the highest id and no tokenizer; "
              "to write text too: --tokenizer=FILE.json")
    vocab_size = codec.vocab_size if codec else top + 1
    sha256 = hash_of_json([sha256_of(path) for path in files])
    about = {"from": os.path.abspath(source), "sha256": sha256, "documents": n}
    splits = [lambda done, rows=rows: itertools.islice(row_shards(files, *rows), len(done), None)
              for rows in ((0, cut), (cut, n))]
    put(target, about, codec, vocab_size, val_fraction, splits)


def put(target, source, codec, vocab_size, val_fraction, splits, limit=0):
    """Writes a dataset, which takes the place of target in the end. False if it is there already.

    splits: a function for train and one for val, called with the list of (entry for meta.json, cursor) of the
    shards that an earlier call has written. It yields (arrays of ids, length of a row or 0, Ids or None) for
    each further shard.
    """
    meta = {"format": _FORMAT, "name": target.name, "source": source, "tokenizer": codec and codec.to_dict(),
            "vocab_size": vocab_size, "split": {"val_fraction": val_fraction}}
    meta["split"] |= {"max_tokens": limit} if limit else {}
    key = hash_of_json([meta, _SHARD, _PIECE]) # of all that decides where shards and pieces end
    part = key[:16] if fcntl else os.getpid() # without locks another call may be at work
    folder = target.with_name(f".{target.name}.{part}.new") # beside target: a rename needs one file system
    with alone(target): # of two calls at once, the second finds what the first has prepared
        here = [target] if target.is_file() else target.glob("*")
        ours = re.compile(r"(meta|progress)\.json|(train|val)_\d{6}\.bin") # all that write_dataset writes
        if others := sorted(path.name for path in here if not ours.fullmatch(path.name)):
            raise UserError(f"{target} is to be replaced, but there are other files: {listed(others, 3)}\n"
                            "move them elsewhere, or choose another folder with --data_dir")
        if is_same(target, meta):
            print(f"{target} is prepared already, from this source with this tokenizer: nothing to do")
            return False
        if target.exists():
            print(f"{target} holds other data, or damaged data, and is replaced")
        try:
            write_dataset(folder, meta, splits, key)
            replace(target, folder)
        except UserError as error:
            if not isinstance(error, DownloadError): # what is wrong with the text will not go away
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if not (folder / "progress.json").exists(): # no shard is finished that a further call could use
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{target}: {load(os.path.abspath(target))}")
    return True


def is_same(target, meta):
    """Whether target holds, undamaged, what meta describes. UserError for another text from another path."""
    try:
        was = read_meta(target)
    except UserError: # not there, or damaged: may be replaced
        return False
    old, new = was["source"], meta["source"]
    if old.get("sha256") != new["sha256"]:
        if meta["name"] in DATASETS or os.path.abspath(old["from"]) == new["from"]:
            return False
        raise UserError(f"{target} was prepared from {old['from']}: {new['from']} would replace it\n"
                        f"choose another --name or another --data_dir, or delete {target} if no run needs it")
    with suppress(UserError): # damaged shards are written again
        keys = "val_fraction", "max_tokens"
        same_split = [was["split"].get(key) for key in keys] == [meta["split"].get(key) for key in keys]
        return same_split and was["tokenizer"] == meta["tokenizer"] and bool(verify(os.path.abspath(target)))
    return False


def write_dataset(folder, meta, splits, key):
    """Writes meta.json and all shards of splits into folder, behind those that a stopped call left there."""
    done, kind = finished(folder, key), token_type(meta["vocab_size"])
    if done:
        tokens = sum(entry["tokens"] for entry, _ in done.values())
        print(f"resuming: {len(done)} shards, {tokens:,} tokens are there")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for split, parts in zip(("train", "val"), splits):
        mine = [done[file] for file in done if split_of(file) == split]
        for number, (arrays, row, ids) in enumerate(parts(mine), len(mine)):
            file = f"{split}_{number:06d}.bin"
            sha256 = write_synced(folder / file, (ids.astype(kind).tobytes() for ids in arrays), kind)
            entry = {"tokens": len(open_shard(folder / file)), "sha256": sha256}
            done[file] = entry | ({"row": row} if row else {}), ids and ids.cursor
            progress = json.dumps({"shards": done, "sha256": hash_of_json([key, done])}).encode()
            write_synced(folder / "progress.part", [progress])
            os.replace(folder / "progress.part", folder / "progress.json")
    shards = {file: entry for file, (entry, _) in done.items()}
    counts = {split: sum(shards[file]["tokens"] for file in shards if split_of(file) == split)
              for split in ("train", "val")}
    if counts["train"] < 2:
        raise UserError(f"{meta['source']['from']} gives {counts['train']} training tokens, "
                        "a model needs at least 2: take a longer text")
    meta = {**meta, "split": {**meta["split"], **counts}, "shards": shards}
    meta["sha256"] = hash_of_json(meta) # a damaged letter in the tokenizer would spoil every sample
    write_synced(folder / "meta.json", [(json.dumps(meta, indent=1) + "\n").encode("utf-8")])


def finished(folder, key):
    """{file: (entry for meta.json, cursor behind it)} of the whole shards that a call with this key left."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads((folder / "progress.json").read_bytes())
        if found["sha256"] == hash_of_json([key, found["shards"]]):
            is_whole = lambda item: has_hash(folder / item[0], item[1][0]["sha256"])
            return dict(itertools.takewhile(is_whole, found["shards"].items()))
    return {}


def replace(target, folder):
    """Puts folder in the place of target, which after any error is as it was. Clears up what was killed."""
    aside = folder.with_suffix(".old")
    ours = re.compile(rf"\.{re.escape(target.name)}\.\w+\.(new|old)")
    for left in target.parent.iterdir(): # another call may be writing one that is younger than an hour
        if ours.fullmatch(left.name) and left != folder and time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    try:
        if target.exists(): # rename does not replace a folder that has files
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        os.rename(folder, target)
        (target / "progress.json").unlink()
    finally:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(aside, ignore_errors=True)


def write_synced(path: Path, pieces, kind: str = "") -> str:
    """Writes pieces of bytes, as a shard if kind is the type of its tokens. Returns the file's sha256."""
    with open(path, "wb") as file:
        file.write(bytes(_HEADER if kind else 0))
        for piece in pieces:
            file.write(piece)
        if kind: # the tokens are counted only now
            count = (file.tell() - _HEADER) // np.dtype(kind).itemsize
            file.seek(0)
            key = next(key for key in WIDTHS if WIDTHS[key] == kind)
            file.write(np.array([*key, count], "<i4").tobytes())
        file.flush()
        os.fsync(file.fileno()) # only what is on the disk may be renamed
    return sha256_of(path)


def train_tokenizer(source, vocab_size: int = 4096, data_dir: str = "data", val_fraction: float = 0.1,
                    field: str = "", name: str = "", max_tokens: int = 0) -> Path:
    """Trains byte pairs on what prepare would train on. Returns their file, data_dir/NAME-SIZE.json."""
    source, tokenizers = str(source), package("tokenizers", "training a tokenizer")
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size} must be at least 257: the 256 bytes, and <|endoftext|>")
    check_settings(source, "", val_fraction)
    if source == "fineweb":
        raise UserError("fineweb holds ids of GPT-2, not text: take another source, say c4")
    origin, files, *own = read_source(source, data_dir, field)
    limit = max_tokens or CORPORA.get(source, 0)
    target = Path(data_dir) / f"{own_name(source, name)}-{vocab_size}.json"
    with alone(target):
        if target.exists():
            raise UserError(f"{target} is there already, and is not replaced\n"
                            "use it, delete it, or choose another --name")
        most = 4 * limit if limit else sys.maxsize # a token has about 4 characters
        if not own: # the end of the text is for validation
            most = min(most, int(sum(len(text or "") for text in joined(files)) * (1 - val_fraction)))
        if most < 1:
            raise UserError(f"{origin} has no training text: take a longer one")
        # The package finds words by GPT-2's pattern, so a text may be divided where GPT-2's tokens end.
        pieces = divided(split_at(joined(files), most)[0], GPT2Tokenizer(), False)
        texts = (without_surrogates(piece) for piece in pieces if isinstance(piece, str))
        codec = tokenizers.ByteLevelBPETokenizer()
        codec.train_from_iterator(texts, vocab_size, special_tokens=["<|endoftext|>"],
                                  show_progress=sys.stderr.isatty()) # keeps the different words, not the text
        part = target.with_suffix(".part")
        write_synced(part, [codec.to_str(pretty=True).encode()])
        os.replace(part, target)
    how = {"tokenizer": target, "val_fraction": val_fraction, "data_dir": data_dir, "field": field}
    flags = [shlex.quote(f"--{key}={value}") for key, value in how.items() if value != ""]
    print(f"{target}: {codec.get_vocab_size():,} ids. To use it:\n"
          f"    python data.py prepare {shlex.quote(source)}", *flags)
    return target


# --- batches ---
@dataclass
class Dataset:
    """What load returns. tokenizer is None if nobody knows it."""
    name: str
    folder: Path
    meta: dict
    tokenizer: Tokenizer | None
    vocab_size: int
    train: "Tokens"
    val: "Tokens"

    def __str__(self):
        kind = self.tokenizer.name if self.tokenizer else "unknown"
        return (f"tokenizer {kind}, vocab_size {self.vocab_size:,}, "
                f"train {len(self.train):,} tokens, val {len(self.val):,} tokens")

    @cached_property
    def sha256(self) -> str:
        """Identifies the data: every shard and the tokenizer. Reads only shards of other programs."""
        shards = {file: entry.get("sha256") or sha256_of(self.folder / file)
                  for file, entry in self.meta["shards"].items()}
        return hash_of_json([shards, self.meta["tokenizer"]])

    def check(self, asked: dict, typed: set, resuming: bool = False) -> None:
        """UserError if asked, {setting: value}, has a tokenizer or val_fraction that this data has not.

        typed: the settings that the command line gave. Those can be dropped, a config file's cannot.
        """
        made = self.tokenizer.to_dict() if self.tokenizer else {"name": "none"}
        share = self.meta.get("split", {}).get("val_fraction") # None: another program wrote the data
        name, folder = asked.get("tokenizer") or made["name"], self.folder.parent
        if name.endswith(".json") and make_tokenizer(name, "", folder).to_dict() == made:
            name = made["name"]
        want = {"tokenizer": name, "val_fraction": asked.get("val_fraction", share)}
        has = {"tokenizer": made["name"], **({} if share is None else {"val_fraction": share})}
        other = [key for key in has if has[key] != want[key]]
        if not other:
            return
        keep, change = (" ".join(f"--{key}={shlex.quote(str(kind[key]))}" for key in other)
                        for kind in (has, want))
        origin = self.name if self.name in DATASETS else shlex.quote(self.meta["source"]["from"])
        again = f"python data.py prepare {'SOURCE' if share is None else origin} {change} --data_dir={folder}"
        told = typed.issuperset(other) # then the person can drop it
        anew = f"run: {again}" if told else f"prepare it apart: {again}2\nand add --data_dir={folder}2"
        if resuming:
            anew = "train anew in another --out_dir"
        raise UserError(f"{self.folder} was prepared with tokenizer={made['name']}, val_fraction={share}, "
                        f"not {change}\n{'drop that' if told else 'add ' + keep}, or {anew}")


class Tokens:
    """One split: memory-mapped shards, each of one or more rows. No window crosses the end of a row.

    rows: the length of the rows of each shard; 0, or nothing, for a shard that is one row.
    """

    def __init__(self, shards, vocab_size: int, label: str, rows=()):
        self.shards, self.vocab_size, self.label = shards, vocab_size, label
        lengths = [row or len(shard) for shard, row in itertools.zip_longest(shards, rows)]
        self.rows = np.array(lengths, np.int64) # (shards,) ids in a row
        self.counts = np.array([*map(len, shards)], np.int64) // np.maximum(self.rows, 1) # (shards,) rows
        self.shuffled = None, 0, None # of the last epoch: its arguments, offset and order

    def __len__(self):
        return sum(map(len, self.shards))

    def batch(self, step: int, batch_size: int, block_size: int, seed: int, epochs: bool = False):
        """(x, y), both (B, T) int64, y one token ahead. UserError if no row has T + 1 tokens.

        A pure function of its arguments, so resuming needs no saved position. Every legal start is equally
        likely, and a smaller batch is the first rows of a larger one. epochs=True: see epoch_starts.
        """
        if min(batch_size, block_size) < 1 or min(seed, step) < 0:
            raise UserError(f"batch_size={batch_size}, block_size={block_size} must be at least 1; "
                            f"seed={seed}, step={step} at least 0")
        room = np.maximum(self.rows - block_size, 0) # (shards,) starts in a row: a window reads T + 1 ids
        total = (self.counts * room).sum()
        if total == 0:
            raise self.too_short(block_size)
        if epochs:
            which, row, first = self.epoch_starts(step * batch_size, batch_size, block_size, seed)
        else: # numbers among the starts of all shards, end to end
            picks = np.random.default_rng([seed, step]).integers(total, size=batch_size)
            which, row, first = self.locate(picks, room) # (B,) each
        return self.cut([self.shards[k] for k in which], row * self.rows[which] + first, block_size)

    def place(self, n: int) -> None:
        """None, because the number of a batch is enough to cut it. A Stream must know where to read on."""

    def locate(self, picks, each):
        """Shard, row and number in its row of things, by their numbers (B,). A row of shard k has each[k]."""
        ends = np.cumsum(self.counts * each) # (shards,)
        which = np.searchsorted(ends, picks, side="right")
        return which, *np.divmod(picks - (ends - self.counts * each)[which], each[which])

    def epoch_starts(self, first, count, T, seed):
        """Shard, row and start of `count` windows, from number `first` on. An epoch cuts every row into
        windows that do not overlap, and takes each of them once, in random order. The next epoch cuts
        elsewhere. The order takes 8 bytes for each window of the text.
        """
        full = np.where(self.rows > T, np.maximum((self.rows - T) // T, 1), 0) # (shards,) windows in a row
        windows = (self.counts * full).sum() # of an epoch
        epochs, numbers = np.divmod(first + np.arange(count), windows)
        parts = []
        for epoch in np.unique(epochs).tolist():
            if self.shuffled[0] != (seed, epoch, T):
                rng = np.random.default_rng([seed, epoch])
                self.shuffled = (seed, epoch, T), rng.integers(T), rng.permutation(windows)
            _, offset, order = self.shuffled
            which, row, window = self.locate(order[numbers[epochs == epoch]], full)
            # A row of fewer than 2 T ids has room for a smaller offset only.
            parts.append((which, row, offset % (self.rows - T * full)[which] + T * window))
        return map(np.concatenate, zip(*parts))

    def windows(self, block_size: int, batch_size: int, limit: int = 0):
        """Yields (x, y), both (up to B, T) int64, that hold every target once. limit: see layout."""
        if min(batch_size, block_size) < 1:
            raise UserError(f"batch_size={batch_size}, block_size={block_size} must be at least 1")
        if all(self.rows < 2):
            raise self.too_short(1)
        for shard, starts, width in self.layout(block_size, limit):
            for k in range(0, len(starts), batch_size):
                some = starts[k:k + batch_size] # (up to B,)
                yield self.cut([shard] * len(some), some, width)

    def layout(self, block_size, limit):
        """Yields (shard, starts, width): the full windows of a shard, then the shorter rest of each row."""
        targets = int(((self.rows - 1) * self.counts).sum()) # the first id of a row is no target
        every = max(-(-targets // limit), 1) if limit else 1 # of k windows one, for about limit targets
        for shard, row, count in zip(self.shards, self.rows.tolist(), self.counts.tolist()):
            full, left = divmod(max(row - 1, 0), block_size) # full windows in a row, targets after them
            window = np.arange(0, count * full, every) # (windows,) of all full windows of the shard
            yield shard, window // max(full, 1) * row + window % max(full, 1) * block_size, block_size
            yield shard, np.arange(0, count if left else 0, every) * row + full * block_size, left

    def targets(self, block_size: int, limit: int = 0) -> int:
        """How many targets windows yields."""
        return sum(len(starts) * width for _, starts, width in self.layout(block_size, limit))

    def cut(self, shards, starts, width):
        """(x, y), both (B, width) int64: the window of each shard at its start. UserError for an id >= V."""
        ids = np.stack([shard[i:i + width + 1] for shard, i in zip(shards, starts)]) # (B, width + 1)
        # The embedding would answer such an id with an IndexError, or crash a GPU.
        if (top := ids.max()) >= self.vocab_size:
            raise UserError(f"{self.label}: id {top} found, expected ids below vocab_size={self.vocab_size}\n"
                            "see python data.py verify NAME, and prepare the dataset again")
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous() # (B, width) each

    def too_short(self, block_size):
        n = int(self.rows.max(initial=0)) # of several shards the longest counts
        rows = "rows of " if any(self.counts > 1) else ""
        lower = f"lower --block_size to {n - 1} or " if n > 1 else ""
        longer = "raise --val_fraction" if self.label.startswith("val") else "take a longer text"
        return UserError(f"{self.label} has {rows}{n} tokens, block_size is {block_size}: "
                         f"{lower}{'take longer rows' if rows else longer}")


class Stream:
    """Training text straight from a source: a chunk of about _CHUNK ids in memory, and the next being read.

    Chunk k is a shuffle buffer: its windows, which do not overlap, come in an order drawn from (seed, k). So
    window n of a run is a function of seed, n, T and the source. After the last file the first comes again.
    """

    def __init__(self, files, codec, begin, label, val, place=None):
        """begin: cursor of the first id. place: of an earlier call; the source is opened there."""
        self.files, self.codec, self.begin, self.label = files, codec, begin, label
        self.places = [[0, 0, *begin], *([place] if place else [])] # of the chunks so far
        self.shards, self.rows = val.shards, [2**62] # as Tokens has them: a first id for samples, a length
        self.asked = None # (T, seed) of the last call
        self.first, self.order = 0, [] # of the chunk in memory: number of its first window, windows in order

    def place(self, n: int) -> list[int]:
        """Where to read on for window n: the first window, the number and the cursor of its chunk."""
        return max(place for place in self.places if place[0] <= n)

    def batch(self, step: int, batch_size: int, block_size: int, seed: int, epochs: bool = False):
        """(x, y), both (B, T) int64, as Tokens.batch gives them, but each window comes once an epoch.

        Quick for steps that rise. For a window of an earlier chunk the source is opened anew.
        """
        numbers = range(step * batch_size, (step + 1) * batch_size)
        ids = np.stack([self.window(n, block_size, seed) for n in numbers]) # (B, T + 1)
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous() # (B, T) each

    def window(self, n, T, seed):
        if (T, seed) != self.asked or n < self.first:
            if self.asked and self.asked[0] != T: # the known places are those of other windows
                del self.places[1:]
            self.asked, self.first, self.order = (T, seed), 0, []
            self.reader = ahead(self.chunks(self.place(n), T))
        while n >= self.first + len(self.order):
            place, self.ids = next(self.reader)
            self.first, k, *cursor = place
            if k and cursor == self.begin:
                say_once(f"{self.label} was read to its end, and begins again")
            if place > self.places[-1]:
                self.places.append(place)
            self.order = np.random.default_rng([seed, k]).permutation((len(self.ids) - 1) // T) # (windows,)
        start = self.order[n - self.first] * T
        return self.ids[start:start + T + 1]

    def chunks(self, place, T):
        """Yields (place, ids) of each chunk, without end. The last id is the first of the next chunk, too."""
        first, k, *cursor = place
        size, ids, new = max(_CHUNK // T, 1) * T, Ids(self.files, self.codec, cursor), cursor == self.begin
        while True:
            cursor = ids.cursor
            parts = [*ids.take(size)]
            if ids.more():
                parts.append(ids.ids[ids.at:ids.at + 1])
            if windows := max(sum(map(len, parts)) - 1, 0) // T:
                yield [first, k, *cursor], np.concatenate(parts)
                first, k, new = first + windows, k + 1, False
            if not ids.more():
                if new:
                    raise UserError(f"{self.label} has no {T + 1} tokens: lower --block_size")
                ids, new = Ids(self.files, self.codec, self.begin), True


def ahead(values):
    """Yields the values. A thread makes the next one meanwhile."""
    def make(future):
        try:
            future.set_result(next(values))
        except BaseException as error: # raised where the value is wanted
            future.set_exception(error)

    value = None
    while True:
        future = Future()
        # daemon: the end of the program does not wait for a download
        threading.Thread(target=make, args=(future,), daemon=True).start()
        if value is not None:
            yield value
        value = future.result()


def stream(source: str, tokenizer: str = "", data_dir: str = "data", val_fraction: float = 0.1,
           place: list[int] | None = None) -> Dataset:
    """A corpus of the hub, or a path, whose text is not prepared but read while it is trained on.

    Validation takes _VALIDATION tokens at most: of the corpus's own validation text, or about val_fraction of
    a path, from its start. Training never reads these. place: see Stream.place.
    """
    tokenizer = tokenizer or "gpt2"
    if source in DATASETS and source not in CORPORA:
        raise UserError(f"{source} is small: drop --stream, or choose --dataset={listed(CORPORA)}, or a path")
    if source not in CORPORA and (find(source, data_dir) or npy_files(source)):
        raise UserError(f"{source} is prepared already: drop --stream")
    if tokenizer == "char":
        raise UserError("tokenizer=char needs the whole text for its vocabulary\n"
                        "with --stream choose --tokenizer=gpt2, byte or ascii")
    check_settings(source, tokenizer, val_fraction)
    origin, files, *own = read_source(source, data_dir)
    codec, most = make_tokenizer(tokenizer, "", data_dir), _VALIDATION
    if not own: # of a path
        inside = [path for _, path in files_below(Path(source)) if path.is_file()] or [Path(source)]
        origin, size = [sha256_of(path) for path in inside], sum(path.stat().st_size for path in inside)
        most = min(most, int(val_fraction * size / 4)) # a token of gpt2 has about 4 bytes
    ids = Ids(own[0] if own else files, codec, most=most)
    val = Tokens([np.concatenate([ids.ids, *ids.take(most)])], codec.vocab_size, f"val split of {source}")
    sha256 = hash_of_json([origin, _CHUNK, _PIECE, _VALIDATION, val_fraction]) # what decides the windows
    meta = {"source": {"from": source}, "tokenizer": codec.to_dict(), "vocab_size": codec.vocab_size,
            "split": {"val_fraction": val_fraction}, "shards": {"stream": {"sha256": sha256}}}
    train = Stream(files, codec, [0, 0, 0] if own else ids.cursor, source, val, place)
    name = source if own else os.path.abspath(source) # what stream finds again, in another folder too
    return Dataset(name, Path(data_dir) / own_name(source), meta, codec, codec.vocab_size, train, val)


# --- command line ---
def show_list(data_dir):
    print("known:")
    for name, source in DATASETS.items():
        print(f"  {name:<16} {getattr(source, 'func', source).__doc__}")
    print(f"prepared in {data_dir}/:")
    for name in prepared(data_dir):
        try:
            about = str(load(name, data_dir))
        except UserError as error: # one damaged dataset must not hide the others
            about = str(error).splitlines()[0]
        print(f"  {name:<16} {about}")


def main(argv: list[str]) -> None:
    words = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv)) # then come the options
    help_asked = "--help" in argv or "-h" in argv
    if help_asked:
        print(__doc__)
    # Options without a command before them get the usage below.
    given = configure(globals(), argv=argv[len(words):] if words or help_asked else [])
    commands = {"prepare": 2, "tokenizer": 2, "verify": 2, "list": 1} # words, the command among them
    command = words[0] if words else ""
    if commands.get(command) != len(words):
        near = [] if command in commands else difflib.get_close_matches(command, commands, n=1, cutoff=0.5)
        asked = f"no command {command!r}{', nearest: ' * bool(near)}{''.join(near)}\n"
        raise UserError(asked * (command not in ("", *commands))
                        + "usage: python data.py prepare SOURCE | tokenizer SOURCE | verify NAME | list, "
                        "then settings, for instance --tokenizer=; all of them: --help")
    if command == "prepare":
        kind = tokenizer if "tokenizer" in given or words[1] not in CORPORA else ""
        prepare(words[1], kind, data_dir, val_fraction, field, name, max_tokens)
    elif command == "tokenizer":
        train_tokenizer(words[1], vocab_size, data_dir, val_fraction, field, name, max_tokens)
    elif command == "verify":
        print("\n".join(verify(words[1], data_dir)))
    else:
        show_list(data_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
