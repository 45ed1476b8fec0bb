"""
Text in, batches out: tokenizers, downloads, binary token shards and the batch loader of nanoSLM.

How to read it: the tokenizers turn text into ids, read_source finds the text, prepare writes the ids as shards, load opens them, and
Tokens cuts batches from them. fetch gets what must come from the network. The command line stands at the end:

    python data.py prepare shakespeare                 # or pystdlib, or a path: a text file, a .jsonl file, a folder of text files
    python data.py prepare book.txt --tokenizer=gpt2   # char (default), ascii, gpt2, byte, or a tokenizer saved as FILE.json
    python data.py prepare path/to/shards --tokenizer=FILE.json    # a folder of shard_*.npy, rows of ids that FILE.json made
    python data.py verify shakespeare                  # or data/shakespeare; reads all: sizes, hashes, ids
    python data.py list                                # what is known and what is prepared

A dataset is a folder data/NAME/, and nothing in it is a pickle:
    train_000000.bin, val_000000.bin    256 int32 (magic, version, token count, zeros), then the tokens: what llm.c and modded-nanogpt read
    meta.json                           source, whole tokenizer, split, the hash of every shard

B rows of a batch   T block_size   N tokens of a shard   an "id" is a token's number, 0 <= id < vocab_size
"""
import configurator # first: see stop_at_once there

import contextlib, difflib, functools, hashlib, itertools, json, os, random, re, shlex, shutil, sys, sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import torch
import urllib3 # comes with requests; some of its errors pass through

try:
    import fcntl
except ImportError:
    fcntl = None # Windows: there two calls at once are not kept apart

from configurator import UserError, configure

# --- settings of the command line ---
tokenizer = "char" # char, ascii, gpt2, byte, or the path of a FILE.json: one saved by us or by Hugging Face's tokenizers
val_fraction = 0.1 # share of the characters, from the end of the text, that becomes the validation split
data_dir = "data" # folder of prepared datasets and of downloaded files

# Private names, because configure() takes every public number or text for a setting.
_FORMAT = 1 # of meta.json; to be raised by a change that makes older folders unreadable
_HEADER = 1024 # bytes: 256 int32
_SHARD = 100_000_000 # tokens in a file at most, as llm.c has it: 200 MB in uint16
_TRIES, _DEADLINE, _PATIENCE = 3, 600, 30 # of a download: attempts, seconds in all, seconds that a busy server may ask us to wait
_TIMEOUT = (10, 30) # seconds to connect, seconds without a byte
WIDTHS = {(20240520, 1): "<u2", (20240801, 7): "<u4"} # (magic, version) -> type of a token; the second is llm.c's form for Llama 3
TEXTS = {".txt", ".md", ".py", ".jsonl"} # meant as text; another file in a folder of texts may be anything
CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b")) # characters that even a log does not have
FIRST_BYTES = { # of files that are no text: what they are, and the way out
    b"\x1f\x8b": "gzip, not text: unpack it with gunzip -k",
    b"%PDF": "a PDF, not text: take its text out, say with pdftotext",
    b"PK\3\4": "a zip archive (as .docx and .epub are), not text: take its text out",
    b"\x93NUMPY": "a numpy array, not text: call it shard_0.npy and prepare its folder",
    b"\xff\xfe": "UTF-16, not UTF-8: iconv -f utf-16 -t utf-8 OLD > NEW",
    b"\xfe\xff": "UTF-16, not UTF-8: iconv -f utf-16 -t utf-8 OLD > NEW",
    **{np.array(key, "<i4").tobytes(): "a shard of tokens, not text: name its folder" for key in WIDTHS}}

# --- tokenizers ---

class Tokenizer:
    """What every tokenizer has: name, vocab_size, encode(text) -> array of ids, decode(ids) -> text, and these."""
    eot = None # the id that separates documents; without one it is a newline

    def __init__(self, char_to_id=None, data_dir="data"):
        self.data_dir = data_dir

    def to_dict(self):
        """What tokenizer_from_dict() needs to make it again, ready for JSON."""
        return {"name": self.name}

    def unknown(self, text):
        """The distinct characters of text that have no id."""
        return []

    def readable(self, ids):
        """decode for what a model writes: a vocabulary padded beyond the tokenizer's has ids without a meaning, shown as U+FFFD."""
        runs = itertools.groupby(ids, key=lambda i: 0 <= i < self.vocab_size)
        return "".join(self.decode(list(run)) if known else "\ufffd" * len(list(run)) for known, run in runs)

    def checked(self, ids):
        """Ids from a list, array or tensor as a flat int64 array. UserError for one that is out of range: numpy would wrap -1 silently."""
        ids = np.asarray(ids.cpu() if torch.is_tensor(ids) else ids, dtype=np.int64).reshape(-1)
        if len(bad := ids[(ids < 0) | (ids >= self.vocab_size)]):
            raise UserError(f"cannot decode id {bad[0]}: this {self.name} tokenizer has 0 to {self.vocab_size - 1}; use the model's own")
        return ids

class CharTokenizer(Tokenizer):
    """One id per character, as in nanoGPT's shakespeare_char. A character that the text did not have is a UserError."""
    name = "char"

    def __init__(self, char_to_id, data_dir="data"):
        if not char_to_id or set(map(repr, char_to_id.values())) != set(map(str, range(len(char_to_id)))):
            raise UserError("the tokenizer's char_to_id must give each character an id of its own: 0, 1, 2 ... without a hole")
        chars = {char: i for char, i in char_to_id.items() if char not in ("<PAD>", "<UNK>")}
        self.char_to_id, self.vocab_size = char_to_id, len(char_to_id)
        # Two tables make encode and decode one numpy look-up each, instead of a Python loop over the characters.
        self.ids = np.full(max(map(ord, chars), default=0) + 2, -1, np.int32) # code point -> id; the last entry is for all beyond
        self.points = np.full(self.vocab_size, 0xFFFD, "<u4") # id -> code point; U+FFFD shows an <UNK>
        for char, i in chars.items():
            self.ids[ord(char)], self.points[i] = i, ord(char)

    def to_dict(self):
        return {"name": self.name, "char_to_id": self.char_to_id, "id_to_char": {str(i): char for char, i in self.char_to_id.items()}}

    def look_up(self, text):
        """(code points, ids), both (len(text),), with id -1 for a character that has none."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4") # UTF-32 is the code points themselves
        return points, self.ids[np.minimum(points, len(self.ids) - 1)]

    def unknown(self, text):
        points, ids = self.look_up(text)
        return [chr(point) for point in np.unique(points[ids < 0])]

    def encode(self, text):
        ids = self.look_up(text)[1]
        if (ids < 0).any():
            raise UserError(f"the vocabulary of {self.vocab_size} characters lacks {listed(map(repr, self.unknown(text)))}\n"
                            "leave them out, or prepare the data with a tokenizer that has them: --tokenizer=byte has all")
        return ids.astype(token_type(self.vocab_size))

    def decode(self, ids):
        return self.points[self.checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")

class AsciiTokenizer(CharTokenizer):
    """One table for every text: <PAD> 0, <UNK> 1, printable ASCII 2 to 96, newline 97, tab 98. Any other character becomes <UNK>."""
    name = "ascii"

    def __init__(self, char_to_id=None, data_dir="data"):
        table = char_to_id or {"<PAD>": 0, "<UNK>": 1, **{chr(c): c - 30 for c in range(32, 127)}, "\n": 97, "\t": 98}
        self.pad, self.unk = table["<PAD>"], table["<UNK>"]
        # Some saved tables also give "\0" the id of <UNK>, as the character that stands in for it: one id, so one entry.
        super().__init__({char: i for char, i in table.items() if char in ("<PAD>", "<UNK>") or i not in (self.pad, self.unk)})

    def encode(self, text):
        ids = self.look_up(text)[1]
        return np.where(ids < 0, self.unk, ids).astype(token_type(self.vocab_size))

    def decode(self, ids):
        ids = self.checked(ids)
        return super().decode(ids[ids != self.pad])

class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: any text, no vocabulary. A lone surrogate is encoded too (surrogatepass) but comes back as U+FFFD."""
    name, vocab_size = "byte", 256

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype("<u2")

    def decode(self, ids):
        return self.checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace") # replace: a model may stop inside a character

class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pairs, by tiktoken. Its files are fetched at the first encode or decode: training on finished shards needs neither."""
    name, eot, vocab_size = "gpt2", 50256, 50257
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    files = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", # the hashes pin the vocabulary:
             "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"} # to_dict() needs no more than the name

    @functools.cached_property
    def codec(self):
        try:
            import tiktoken # only here: who trains on characters does not need it
        except ImportError as error:
            raise UserError("the gpt2 tokenizer needs a package: pip install tiktoken (char, ascii and byte do without)") from error
        # tiktoken's own download has no timeout. Its cache, with files named by the sha1 of their address, is filled before it looks.
        cache = Path(self.data_dir) / "tiktoken"
        for filename, sha256 in self.files.items():
            cached = cache / hashlib.sha1((self.address + filename).encode()).hexdigest()
            if not has_hash(cached, sha256):
                found = fetch(self.address + filename, filename, sha256, self.data_dir)
                with writing(cached), alone(cached): # by a name of our own: nobody reads half of it
                    os.replace(shutil.copyfile(found, f"{cached}.{os.getpid()}"), cached)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
        return tiktoken.get_encoding("gpt2")

    def encode(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") # a lone surrogate to U+FFFD, as tiktoken's encode does
        # nothing disallowed: "<|endoftext|>" inside a document is text; it must not become the separator, nor raise
        return self.codec.encode_to_numpy(text, disallowed_special=()).astype("<u2")

    def decode(self, ids):
        return self.codec.decode(self.checked(ids).tolist())

class HFTokenizer(Tokenizer):
    """One of Hugging Face's `tokenizers`, from the text of its JSON file, which is kept whole. The package is imported at the first encode
    or decode: training on finished shards does without. Special tokens in a text are text, nothing is added, cut or padded."""
    name = "hf"

    def __init__(self, text, data_dir="data"):
        self.text, saved = text, json.loads(text)
        vocab = saved["model"]["vocab"] # a table of ids, or Unigram's list of (piece, score)
        known = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        known |= {token["content"]: token["id"] for token in saved.get("added_tokens") or []}
        self.vocab_size = max(known.values()) + 1 # not their number: ids may have holes
        self.eot = next((known[end] for end in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>") if end in known), None)
        self.unk = saved["model"].get("unk_id", known.get(saved["model"].get("unk_token")))

    def to_dict(self):
        return {"name": self.name, "json": self.text}

    @functools.cached_property
    def codec(self):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("this FILE.json needs a package: pip install tokenizers (char, ascii and byte do without)") from error
        try:
            codec = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error: # the package raises no class of its own
            raise UserError(f"the tokenizers package {tokenizers.__version__} cannot read this tokenizer: {error}") from error
        codec.no_truncation()
        codec.no_padding()
        codec.encode_special_tokens = True # "<|endoftext|>" inside a document must not become the separator
        return codec

    def unknown(self, text):
        """Characters that become <UNK> or nothing. Spaces do not count: whole families of these tokenizers split at them and drop them."""
        alone = {char: self.encode(char).tolist() for char in sorted(set(text)) if not char.isspace()}
        return [char for char, ids in alone.items() if not ids or self.unk in ids]

    def encode(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") # a lone surrogate to U+FFFD, as for gpt2
        # fast: without character offsets, which double the time
        return np.array(self.codec.encode_batch_fast([text], add_special_tokens=False)[0].ids, token_type(self.vocab_size))

    def decode(self, ids):
        return self.codec.decode(self.checked(ids).tolist(), skip_special_tokens=False)

TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, AsciiTokenizer, GPT2Tokenizer, ByteTokenizer)}

def tokenizer_from_dict(d, data_dir="data"):
    """The tokenizer that to_dict() described, or a table given as {"char_to_id", "id_to_char"} alone. UserError for anything else."""
    try:
        if d.get("name") == "hf":
            return HFTokenizer(d["json"], data_dir)
        name = d["name"] if "name" in d else "ascii" if "<UNK>" in d["char_to_id"] else "char"
        return TOKENIZERS[name](d.get("char_to_id"), data_dir)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"not a saved tokenizer: it needs a name ({', '.join(TOKENIZERS)}), or a char_to_id and id_to_char,\n"
                        "or to be a tokenizer.json of Hugging Face's tokenizers, with a model and its vocab") from error

def make_tokenizer(name, text_chars, data_dir="data"):
    """The tokenizer called name, for a text with the characters text_chars. name may be a FILE.json, also another dataset's meta.json."""
    if name in TOKENIZERS: # char: the sorted characters of the text, nanoGPT's vocabulary
        return TOKENIZERS[name]({char: i for i, char in enumerate(sorted(set(text_chars)))} if name == "char" else None, data_dir)
    if not name.endswith(".json") or not os.path.isfile(name):
        raise UserError(f"no tokenizer {name!r}: choose {', '.join(TOKENIZERS)}, or a FILE.json that holds a saved one")
    try:
        saved = json.loads(text := read_text(name))
        if isinstance(saved, dict) and isinstance(saved.get("model"), dict): # of the two kinds of file only theirs has a model
            return tokenizer_from_dict({"name": "hf", "json": text}, data_dir)
        return tokenizer_from_dict(saved["tokenizer"] if isinstance(saved, dict) and "tokenizer" in saved else saved, data_dir)
    except (ValueError, RecursionError) as error: # the JSON is none, or a UserError from the line above
        raise UserError(f"{name}: {error}") from error

# --- sources: where the text comes from, as a list of documents ---

def read_text(path):
    """The text of a UTF-8 file, without a byte order mark and with its line ends as they are. UserError for
    anything else: it says what the file seems to be."""
    try:
        raw = Path(path).read_bytes() # bytes: reading as text would turn \r\n into \n
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if what := next((what for first, what in FIRST_BYTES.items() if raw.startswith(first)), None):
        raise UserError(f"{path} is {what}")
    even, odd = (raw[::2].count(0), raw[1::2].count(0)) if 0 in raw else (0, 0) # zeros at even, odd offsets
    wide = min(even, odd) < 0.05 * len(raw) and max(even, odd) > 0.4 * len(raw)
    letters = raw.replace(b"\0", b"") if wide else raw # small ids have as many zeros, and control characters
    if len(letters.translate(None, CONTROLS)) < 0.99 * len(letters):
        raise UserError(f"{path} is no text: more than one byte in a hundred is a control character\n"
                        "convert it to plain text in UTF-8, or name another file")
    try:
        if not wide:
            return raw.decode("utf-8").removeprefix("\ufeff")
        code, what = "utf-16be" if even > odd else "utf-16le", "every second byte is zero"
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        code = "windows-1252" if re.search(b"[\x80-\x9f]", raw) else "latin1" # Latin-1 has no letters there
    raise UserError(f"{path} is not UTF-8: {what}\n"
                    f"re-encode it; if it is {code}: iconv -f {code} -t utf-8 OLD > NEW")

def read_file(path):
    """The documents of one file: the field "text" of every line of a .jsonl, else the whole text as one."""
    if is_part(Path(path)):
        raise UserError(f"{path} is part of a dataset, not text: name its folder, {Path(path).parent}")
    if Path(path).suffix != ".jsonl":
        return [read_text(path)]
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), 1): # not splitlines: U+2028 may stand inside a JSON string
        try:
            documents += [json.loads(line)["text"] + ""] if line.strip() else [] # + "": a TypeError if it is no text
        except (KeyError, TypeError) as error:
            raise UserError(f'{path} line {number} has no text: every line must look like {{"text": "..."}}') from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
    return documents

def read_folder(folder):
    """The documents of all text files below folder, sorted by path. Hidden files do not count."""
    documents, left_out = [], []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            found = read_file(path)
        except UserError:
            if path.suffix in TEXTS: # so the user must know
                raise
            found = ["\0"]
        if any("\0" in text for text in found): # a shard of small ids is valid UTF-8, but half of it is zero bytes
            left_out.append(path.name)
        else:
            documents += found
    if left_out:
        print(f"left out, because they are no text in UTF-8: {listed(left_out)}")
    if not documents:
        raise UserError(f"{folder} has no text files: put .txt, .md, .py or .jsonl files there, or name another folder")
    return documents

def shakespeare(data_dir):
    """TinyShakespeare: 1,115,394 characters of his plays, which nanoGPT trains on (a download of 1.1 MB)"""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    return url, [read_text(fetch(url, "tinyshakespeare.txt", sha256, data_dir))]

def pystdlib(data_dir):
    """Python's own standard library, cut to TinyShakespeare's length so that one training budget fits both (no network)"""
    raw = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.name)]
    text = b"".join(part for part in raw if part.isascii()).decode("ascii").replace("\r\n", "\n")[:1_115_394]
    if len(text) < 1_115_394:
        raise UserError("this Python has no readable standard library: prepare a text file of your own instead")
    return f"the standard library of Python {sys.version.split()[0]}", [text]

def recall(data_dir):
    """1,024 lines of 511 pairs such as a3c5a3: in each line its own digit for each of 8 letters; a test of memory (no network)"""
    rng, lines = random.Random(0), []
    for _ in range(1024):
        digit = {letter: int(10 * rng.random()) for letter in "abcdefgh"}
        letters = ("abcdefgh"[int(8 * rng.random())] for _ in range(511))
        lines.append("".join(f"{letter}{digit[letter]}" for letter in letters) + ".") # with its newline 1024 characters
    return "made by data.py", lines

DATASETS = {"shakespeare": shakespeare, "pystdlib": pystdlib, "recall": recall}

def dataset_name(stem):
    """stem as a folder name: letters of any script, digits and . _ - only, so that it cannot lead elsewhere."""
    return re.sub(r"[^\w.-]+", "_", stem).strip("._-")[:100] or "text"

def own_name(path):
    """The name of the dataset that a file or folder of the person's own becomes. UserError for the name of a
    known dataset: --dataset=shakespeare must mean one text."""
    path = Path(os.path.abspath(path)) # so that "." has a name
    if (name := dataset_name(path.name if path.is_dir() else path.stem)) in DATASETS:
        raise UserError(f"{path} would take the name of a known dataset, {name}\n"
                        f"rename it, say to my_{path.name}")
    return name

def read_source(source, data_dir):
    """(name of the dataset, where the text is from, documents) for a known dataset or a path. UserError if it is neither."""
    if source in DATASETS:
        return source, *DATASETS[source](data_dir)
    path = Path(os.path.abspath(source))
    if source and os.path.isdir(path):
        return own_name(path), str(path), read_folder(Path(source))
    if source and os.path.isfile(path):
        return own_name(path), str(path), read_file(source)
    beside = path.parent.iterdir() if os.path.isdir(path.parent) else ()
    beside = [os.path.join(os.path.dirname(source), entry.name) for entry in beside
              if entry.name[0] not in "._" and (entry.is_dir() or entry.suffix in TEXTS)]
    near = difflib.get_close_matches(source, [*DATASETS, *prepared(data_dir), *beside], n=3)
    raise UserError(f"no text file, folder or known dataset {source!r}\n"
                    f"{'nearest' if near else 'known'}: {listed(near or DATASETS)}")

# --- token shards of other programs: shard_*.npy, each an array of rows that are sequences by themselves ---

def npy_files(source):
    """The shards in a folder, shard_2 before shard_10; none in anything else."""
    found = Path(source).glob("shard_*.npy") if source and source not in DATASETS and os.path.isdir(source) else ()
    return sorted(found, key=lambda path: (len(path.name), path.name))

def open_npy(path):
    """The rows in a file, (rows, length), as a memory map. UserError if it is damaged, a pickle, or something else than ids."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        what = f"{rows.dtype} of shape {rows.shape}" # an archive of several arrays has neither
    except Exception as error: # a bad header raises many kinds, tokenize.TokenError among them
        raise UserError(f"{path} is damaged or no .npy file: {' '.join(str(error).split())[:100]}\n"
                        "fetch it again, or move it elsewhere") from error
    if rows.ndim != 2 or rows.dtype.kind not in "iu" or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise UserError(f"{path} has {what}, expected rows of ids: integers of shape (rows, 2 or more)\nmove it elsewhere, or reshape it")
    return rows

def highest_row_id(files, limit=2 ** 32):
    """The highest id in all files. UserError at an id that is negative or not below limit: it names the file."""
    top = -1
    for path in files:
        rows = open_npy(path)
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= limit:
            raise UserError(f"{path}: id {low if low < 0 else high} found, expected ids from 0 to below vocab_size={limit}\n"
                            "name the tokenizer that made the shards, or fetch the file again")
        top = max(top, high)
    return top

def row_parts(files, first, last, kind):
    """Yields (ids, length of a row) of the rows first to last, counted through all files, at most one shard at a time."""
    for rows in map(open_npy, files):
        n, length = rows.shape
        step = max(1, _SHARD // length)
        for start in range(max(first, 0), min(last, n), step):
            yield rows[start:min(start + step, last, n)].astype(kind).reshape(-1), length
        first, last = first - n, last - n

# --- small tools ---

def token_type(vocab_size): return "<u2" if vocab_size <= 65536 else "<u4"

def split_of(file):
    """The split of a shard, by the word train or val in its name: interval_train_2.bin is for training. None
    if it has neither word, or both."""
    found = set(re.findall("(?<![a-z])(train|val)(?:ing|id|idation)?(?![a-z])", file.lower()))
    return found.pop() if len(found) == 1 else None

def is_meta(path):
    """Whether a file is the meta.json of a dataset, damaged or not. Texts may have another of that name."""
    with contextlib.suppress(OSError, ValueError):
        raw = Path(path).read_bytes()
        return all(key in raw for key in (b'"format"', b'"tokenizer"', b'"shards"'))
    return False

def is_part(path):
    """Whether a file is a shard or the meta.json of a dataset: never text, wherever it lies."""
    return (path.suffix == ".bin" and split_of(path.name) is not None or path.match("shard_*.npy")
            or path.name == "meta.json" and is_meta(path))

def is_dataset(folder):
    """Whether a folder has training shards, or the meta.json of a dataset."""
    return os.path.isdir(folder) and (is_meta(Path(folder) / "meta.json") or any(
        split_of(path.name) == "train" for path in Path(folder).glob("*.bin")))

def hash_of_json(value): return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()

def has_hash(path, sha256): return path.is_file() and sha256_of(path) == sha256

def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()

def listed(names, limit=10):
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

@contextlib.contextmanager
def writing(path):
    """Says to a person that a disk is full or a folder read-only."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}\nfree some space, or choose another --data_dir") from error

@contextlib.contextmanager
def alone(path):
    """One process or thread at a time makes path; the others wait. Where no lock can be had (Windows, a
    read-only folder) nobody waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, file = path.with_name(f".{path.name}.lock"), None
    while fcntl:
        try:
            file = open(lock, "ab")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path} is being made by another process: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        file.close() # the one before has deleted this file: the lock is that of the new file, if there is one
    try:
        yield
    finally:
        if file:
            lock.unlink(missing_ok=True)
            file.close()

# --- prepare: text -> shards ---

def split_documents(documents, val_fraction):
    """(train, val) by characters: of one document nanoGPT's text[:int(n * 0.9)]. The document under the cut goes to both sides."""
    cut = int(sum(map(len, documents)) * (1 - val_fraction))
    train, val = [], []
    for document in documents:
        train.append(document[:cut])
        val.append(document[cut:])
        cut = max(cut - len(document), 0)
    return [text for text in train if text], [text for text in val if text]

def encode_all(documents, codec):
    """The ids of all documents, (N,), with a separator between two."""
    parts = [np.zeros(0, token_type(codec.vocab_size))]
    for i, document in enumerate(documents):
        if i:
            parts.append(codec.encode("\n") if codec.eot is None else np.array([codec.eot], parts[0].dtype))
        parts.append(codec.encode(document))
    return np.concatenate(parts)

def write_synced(path, content):
    """Returns the sha256 of content once it is on the disk: the rename that follows must not be there before it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()

def text_parts(documents, codec):
    """Yields (ids, 0), the 0 for no rows, at most one shard at a time, at least once."""
    ids = encode_all(documents, codec)
    for start in range(0, max(len(ids), 1), _SHARD):
        yield ids[start:start + _SHARD], 0

def write_split(folder, split, parts):
    """Every (ids, length of a row) of parts as a shard. Returns {file: its entry in meta.json}."""
    entries = {}
    for ids, row in parts:
        file = f"{split}_{len(entries):06d}.bin"
        header = np.zeros(_HEADER // 4, "<i4")
        header[:3] = *next(key for key in WIDTHS if WIDTHS[key] == ids.dtype), len(ids)
        entries[file] = {"tokens": len(ids), "sha256": write_synced(folder / file, header.tobytes() + ids.tobytes())}
        entries[file] |= {"row": row} if row else {}
    return entries

def write_dataset(folder, splits, meta):
    """All files of a dataset into folder; splits: {"train": parts, "val": parts}, see write_split. Returns meta, completed."""
    shards = {}
    for split, parts in splits.items():
        shards |= write_split(folder, split, parts)
    counts = count_tokens(shards)
    if counts["train"] < 2:
        raise UserError(f"{meta['source']['from']} gives {counts['train']} training tokens, a model needs at least 2: take a longer text")
    meta = {**meta, "split": {**meta["split"], **counts}, "shards": shards}
    meta["sha256"] = hash_of_json(meta) # of all the rest: one damaged letter in the tokenizer would spoil every sample in silence
    write_synced(folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode("utf-8"))
    return meta

def count_tokens(shards):
    return {split: sum(entry["tokens"] for file, entry in shards.items() if split_of(file) == split) for split in ("train", "val")}

@contextlib.contextmanager
def replacing(target):
    """Gives a new folder that takes the place of target in the end. If anything goes wrong before, target is as it was."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    aside = temporary.with_suffix(".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True) # in a container a killed run may have had our process id
        temporary.mkdir(parents=True)
        for left in target.parent.glob(f".{target.name}.*.new"): # of a run that was killed, if it has not been touched for an hour
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
        yield temporary
        if target.exists(): # rename does not replace a folder that has files
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        os.rename(temporary, target)
    finally:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)

def is_prepared(target, meta):
    """Whether target already holds, undamaged, what meta describes. UserError if it holds files that replacing it would destroy."""
    here = [path.name for path in target.iterdir()] if target.is_dir() else [target.name] if target.exists() else []
    if others := [name for name in sorted(here) if not re.fullmatch(r"meta\.json|(train|val)_\d{6}\.bin", name)]:
        raise UserError(f"{target} is to be replaced, but there are other files: {listed(others, 3)}\n"
                        "move them elsewhere, or choose another folder with --data_dir")
    try:
        same = lambda m: [m["source"]["sha256"], m["tokenizer"], m["split"]["val_fraction"]]
        path = os.path.abspath(target) # by its path: the bare name may also be that of a folder here
        return same(load(path).meta) == same(meta) and bool(verify(path))
    except (UserError, KeyError): # not there, damaged, or from another program: to be written
        return False

def prepare(source, tokenizer="char", data_dir="data", val_fraction=0.1):
    """Writes source, a known dataset or a path, as shards and meta.json, and returns their folder data_dir/NAME. Text and ids are held in
    memory: 11 bytes per character measured for char, 7 byte, 5 gpt2, 133 with `tokenizers`. A folder of shard_*.npy goes shard by shard.
    Without a tokenizer the dataset keeps the one it has, else char. Raises UserError; an interrupted call
    leaves no half dataset."""
    source = str(source)
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must be at least 0 and below 1: the share of the text for validation, say 0.1")
    if is_dataset(data_dir) or npy_files(str(data_dir)): # a dataset would be made among the shards of another
        raise UserError(f"--data_dir={data_dir} holds shards: it is a dataset, not a folder of datasets; "
                        f"did you mean --dataset={data_dir}?")
    there = is_dataset(source) or not os.path.exists(source) and find(source, data_dir)
    if there and source not in DATASETS:
        raise UserError(f"{source} is a prepared dataset, not text: python train.py --dataset={source}\n"
                        "to make it anew, prepare the text that it was made from")
    try:
        if files := npy_files(source):
            return prepare_rows(source, files, tokenizer, data_dir, val_fraction)
        return prepare_text(source, tokenizer, data_dir, val_fraction)
    except MemoryError as error:
        raise UserError(f"{source} does not fit into memory: a character takes 5 bytes with --tokenizer=gpt2,"
                        " 7 with byte, 11 with char\ntake one of these, or a part of the text") from error

def usual_tokenizer(folder):
    """The tokenizer that the dataset in folder has already, as --tokenizer has it; char if there is none."""
    codec = load(os.path.abspath(folder)).tokenizer if is_dataset(folder) else None
    name = codec.name if codec else "char"
    return name if name in TOKENIZERS else str(folder / "meta.json") # a vocabulary that only its own file has

def prepare_text(source, tokenizer, data_dir, val_fraction):
    """prepare for text: a file, a folder or a known dataset."""
    name, origin, documents = read_source(source, data_dir)
    documents = [text for text in documents if text]
    if not documents:
        raise UserError(f"{source} is empty: there is no text to prepare")
    chars = "".join(sorted(set().union(*documents, "\n" if len(documents) > 1 else ""))) # the newline: it goes between documents
    codec = make_tokenizer(tokenizer or usual_tokenizer(Path(data_dir) / name), chars, data_dir)
    codec.encode(chars) # a character without an id stops us now, not after an hour of encoding
    text_hash = hashlib.sha256(b"\xff".join(text.encode("utf-8", "surrogatepass") for text in documents)) # 0xff: never in UTF-8
    meta = {"format": _FORMAT, "name": name, "source": {"from": origin, "sha256": text_hash.hexdigest(), "documents": len(documents)},
            "tokenizer": codec.to_dict(), "vocab_size": codec.vocab_size, "split": {"val_fraction": val_fraction}}
    texts = dict(zip(("train", "val"), split_documents(documents, val_fraction)))
    if put(Path(data_dir) / name, meta, {split: text_parts(texts[split], codec) for split in texts}) and (lost := codec.unknown(chars)):
        print(f"{len(lost)} different characters have no id and became <UNK>: {listed(map(repr, lost))}")
    return Path(data_dir) / name

def prepare_rows(source, files, tokenizer, data_dir, val_fraction):
    """prepare for shard_*.npy: the last rows become the validation split. Rows are kept apart, for nothing says that one goes on in the
    next. Without a tokenizer (char cannot have made ids of this kind) the vocabulary ends with the highest id."""
    target = Path(data_dir) / own_name(source)
    if stray := [path.name for path in files if split_of(path.name) == "val"]:
        raise UserError(f"{source}: the last rows of all shards become the validation split, not {stray[0]}\n"
                        "move it elsewhere, or rename it without the word val")
    tokenizer = tokenizer or usual_tokenizer(target)
    codec = make_tokenizer(tokenizer, "", data_dir) if tokenizer != "char" else None
    top, n = highest_row_id(files, codec.vocab_size if codec else 2 ** 32), sum(len(open_npy(path)) for path in files)
    cut = int(n * (1 - val_fraction))
    if cut < 1:
        raise UserError(f"{source} has {n} row, and rows are not divided: take more of them, or --val_fraction=0")
    if codec is None:
        print(f"{source}: assumed vocab_size={top + 1} by the highest id and no tokenizer; to write text too: --tokenizer=FILE.json")
    vocab_size = codec.vocab_size if codec else top + 1
    hashes = hash_of_json([sha256_of(path) for path in files])
    meta = {"format": _FORMAT, "name": target.name,
            "source": {"from": os.path.abspath(source), "sha256": hashes, "documents": n},
            "tokenizer": codec.to_dict() if codec else None,
            "vocab_size": vocab_size, "split": {"val_fraction": val_fraction}}
    kind = token_type(vocab_size)
    put(target, meta, {"train": row_parts(files, 0, cut, kind), "val": row_parts(files, cut, n, kind)})
    return target

def other_source(target, meta):
    """What the dataset in target was prepared from, if it is another path and another text than meta's. None
    if nobody can tell: damaged data may be replaced."""
    try:
        was, new = read_meta(target)["source"], meta["source"]
        same = was.get("sha256") == new["sha256"] or os.path.abspath(was["from"]) == new["from"]
        return None if same or meta["name"] in DATASETS else was["from"]
    except (UserError, KeyError):
        return None

def put(target, meta, splits):
    """Writes the dataset that meta describes into the folder target, and says so; False if it lies there already."""
    with writing(target), alone(target): # of two calls at once the second finds what the first has prepared
        if is_prepared(target, meta):
            print(f"{target} is prepared already, from the same source with the same tokenizer: "
                  "nothing to do")
            return False
        if other := other_source(target, meta):
            raise UserError(f"{target} was prepared from {other}: {meta['source']['from']} would replace it\n"
                            f"choose another --data_dir, rename one, or delete {target} if no run needs it")
        if target.exists():
            print(f"{target} holds other data, or damaged data, and is replaced")
        with replacing(target) as folder:
            meta = write_dataset(folder, splits, meta)
    print(f"{target}: {summary(meta)}")
    return True

# --- load: shards -> batches ---

def damaged(path, what):
    return UserError(f"{path}: {what}\nrestore the file, or prepare the dataset again: python data.py prepare SOURCE")

def open_shard(path, tokens=None):
    """The ids in a file as a memory map, (N,). Checks size and header, and N if meta.json told it in tokens. Only a file that no meta.json
    describes may lack the header, as nanoGPT's do: GPT-2's ids never look like one, since the first would be 55,432 of 50,257."""
    if not path.is_file():
        raise damaged(path, f"missing, expected a file of {tokens} tokens")
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic, version, count = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    width = WIDTHS.get((magic, version))
    if width is None and tokens is not None:
        raise damaged(path, f"starts with {magic}, {version}, expected {' or '.join(f'{m}, {v}' for m, v in WIDTHS)}")
    if width is None and (size == 0 or size % 2):
        raise damaged(path, f"{size} bytes, expected 2 for each token (it has no header, as in nanoGPT)")
    if width is None:
        return np.memmap(path, "<u2", "r")
    if count < 0 or tokens is not None and count != tokens:
        raise damaged(path, f"the header counts {count} tokens, expected {'0 or more' if tokens is None else tokens}")
    if size != (expected := _HEADER + count * np.dtype(width).itemsize):
        raise damaged(path, f"{size} bytes, expected {expected} for {count} tokens")
    return np.memmap(path, width, "r", offset=_HEADER, shape=(count,))

def highest(shard, enough=2 ** 32):
    """The highest id in a shard, -1 if it has none. Reads piece by piece, and no further than to one that is enough."""
    top = -1
    for start in range(0, len(shard), 2 ** 24):
        top = max(top, int(shard[start:start + 2 ** 24].max()))
        if top >= enough:
            break
    return top

def read_meta(folder):
    """The contents of meta.json, which carries its own hash; for a folder of nanoGPT or llm.c, what can be guessed without one."""
    path = folder / "meta.json"
    if not path.exists():
        return guess_meta(folder)
    try:
        meta = json.loads(path.read_bytes())
        intact = hash_of_json({key: value for key, value in meta.items() if key != "sha256"}) == meta.get("sha256")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, f"cannot be read ({error})") from error
    if meta.get("format") != _FORMAT:
        raise damaged(path, f"has format {meta.get('format')!r}, expected {_FORMAT}")
    if not intact:
        raise damaged(path, "does not match the sha256 in it: it was damaged or edited")
    return meta

def guess_meta(folder):
    """Says what it assumed, since a wrong guess would show only in the samples."""
    files = sorted(path.name for path in folder.glob("*.bin"))
    shards = {file: open_shard(folder / file) for file in files if split_of(file)}
    if "train" not in map(split_of, shards):
        raise UserError(f"{folder} has neither meta.json nor train.bin: make a dataset with python data.py prepare SOURCE")
    if left_out := [file for file in files if file not in shards]:
        print(f"{folder}: left out {listed(left_out)}: a shard has either train or val in its name")
    top = max(highest(shard, enough=256) for shard in shards.values())
    vocab_size, saved = (50257, {"name": "gpt2"}) if top > 255 else (top + 1, None)
    print(f"{folder} has no meta.json: assumed vocab_size={vocab_size} and {'the gpt2' if saved else 'no'} tokenizer, by the highest id")
    if (folder / "meta.pkl").exists():
        print("its meta.pkl is a pickle, which may run any code when it is opened, and is not read. To have the tokenizer too:\n"
              f"    python data.py prepare {folder / 'input.txt'}")
    return {"source": {"from": "another program"}, "tokenizer": saved, "vocab_size": vocab_size,
            "shards": {file: {"tokens": len(shard)} for file, shard in shards.items()}}

def find(name, data_dir="data"):
    """The folder of a prepared dataset, given by its name in data_dir or by its path, or None."""
    path = os.path.abspath(name)
    named = Path(data_dir) / os.path.basename(path)
    places = [named] if name == named.name or path == os.path.abspath(named) else []
    places += [Path(path)] if name not in DATASETS else []
    return next((folder for folder in places if name and is_dataset(folder)), None)

def load(name, data_dir="data"):
    """Opens a prepared dataset, given by its name or by its path, and returns a Dataset. Quick: looks at
    sizes and headers; verify() reads all. Raises UserError."""
    name = str(name)
    folder = find(name, data_dir) or name == dataset_name(name) and Path(data_dir) / name
    if not folder or not folder.is_dir():
        raise UserError(f"no dataset {name!r} in {data_dir}/, only: {listed(prepared(data_dir)) or 'none'}\n"
                        f"to make one: python data.py prepare {name if name in DATASETS else 'shakespeare, or the path of a text'}")
    name, meta, splits = folder.name, read_meta(folder), {"train": [], "val": []}
    for file, entry in sorted(meta["shards"].items()):
        if os.path.basename(file) != file or not split_of(file):
            raise damaged(folder / "meta.json", f"names the file {file!r}, expected a shard in this folder")
        splits[split_of(file)].append((open_shard(folder / file, entry["tokens"] if "sha256" in entry else None), entry.get("row", 0)))
    codec = tokenizer_from_dict(meta["tokenizer"], data_dir) if meta["tokenizer"] else None
    train, val = (Tokens([shard for shard, _ in found], meta["vocab_size"], f"{split} split of {name}", [row for _, row in found])
                  for split, found in splits.items())
    return Dataset(name, folder, meta, codec, meta["vocab_size"], train, val)

@dataclass
class Dataset:
    """What load returns. tokenizer is None if nobody knows it."""
    name: str
    folder: Path
    meta: dict
    tokenizer: object
    vocab_size: int
    train: "Tokens"
    val: "Tokens"

    @functools.cached_property
    def sha256(self):
        """Identifies the data: every shard and the tokenizer. Only shards of other programs must be read for it."""
        shards = {file: entry.get("sha256") or sha256_of(self.folder / file) for file, entry in self.meta["shards"].items()}
        return hash_of_json([shards, self.meta["tokenizer"]])

    def check(self, asked, typed, resuming=False):
        """UserError if asked, {setting: value}, has a tokenizer or val_fraction that the data has not; it
        would be ignored. typed: the settings of the command line itself; a config's cannot be dropped."""
        made = self.tokenizer.to_dict() if self.tokenizer else {"name": "none"}
        share = self.meta.get("split", {}).get("val_fraction") # None: from another program, which did not say
        name, folder = asked.get("tokenizer") or made["name"], self.folder.parent
        by_file = name.endswith(".json") and make_tokenizer(name, "", folder).to_dict() == made
        other = {} if name == made["name"] or by_file else {"tokenizer": name}
        if share not in (None, asked.get("val_fraction", share)):
            other["val_fraction"] = asked["val_fraction"]
        if not other:
            return
        flags = lambda values: " ".join(f"--{key}={shlex.quote(str(values[key]))}" for key in other)
        has = flags({"tokenizer": made["name"] if made["name"] in TOKENIZERS else "", "val_fraction": share})
        origin = self.name if self.name in DATASETS else self.meta["source"]["from"]
        again = f"python data.py prepare {'SOURCE' if share is None else shlex.quote(origin)} {flags(other)}"
        told = typed.issuperset(other)
        anew = ("train anew in another --out_dir" if resuming else f"run: {again} --data_dir={folder}" if told
                else f"prepare it apart: {again} --data_dir={folder}2\nand add --data_dir={folder}2")
        raise UserError(f"{self.folder} was prepared with tokenizer={made['name']}, val_fraction={share}, "
                        f"not {flags(other)}\n{'drop that' if told else 'add ' + has}, or {anew}")

class Tokens:
    """One split: a list of memory-mapped shards. No window crosses from one shard into the next, nor from one row into the next where a
    shard has rows (their length in rows; 0: the shard is one)."""

    def __init__(self, shards, vocab_size, label, rows=()):
        self.shards, self.vocab_size, self.label = shards, vocab_size, label
        self.rows = np.array([row or len(shard) for shard, row in itertools.zip_longest(shards, rows)], np.int64) # (shards,) ids in a row
        self.counts = np.array([len(shard) for shard in shards], np.int64) // np.maximum(self.rows, 1) # (shards,) rows

    def __len__(self):
        return sum(map(len, self.shards))

    def batch(self, step, batch_size, block_size, seed):
        """(x, y), both (B, T) int64, y one token ahead. A pure function of (seed, step), so resuming needs no saved position. Every legal
        start is equally likely; a smaller batch is the first rows of a larger one. UserError if no row has T + 1 tokens."""
        if min(batch_size, block_size) < 1 or min(seed, step) < 0:
            raise UserError(f"batch_size={batch_size}, block_size={block_size} must be at least 1; seed={seed}, step={step} at least 0")
        room = np.maximum(self.rows - block_size, 0) # (shards,) legal starts in a row: a window reads T + 1 ids
        starts = self.counts * room
        if starts.sum() == 0:
            raise self.too_short(block_size)
        picks = np.random.default_rng([seed, step]).integers(starts.sum(), size=batch_size) # (B,) in the starts of all shards, end to end
        ends = np.cumsum(starts)
        which = np.searchsorted(ends, picks, side="right") # (B,) shard of each row
        row, first = np.divmod(picks - (ends - starts)[which], room[which]) # (B,) row in that shard, position in the row
        return self.cut([self.shards[k] for k in which], row * self.rows[which] + first, block_size)

    def windows(self, block_size, batch_size, limit=0):
        """Yields (x, y), both (up to B, T) int64, that hold every target of the split exactly once: N - 1 of a shard, or R - 1 of each
        of its rows. After the full windows of a shard comes what is left of each row, shorter. UserError if the split has no target.
        limit > 0: of a split with more targets about that many, in every k-th window."""
        if min(batch_size, block_size) < 1:
            raise UserError(f"batch_size={batch_size}, block_size={block_size} must be at least 1")
        if all(self.rows < 2):
            raise self.too_short(1)
        for shard, row, full, left, many, more in self.layout(block_size, limit):
            whole = (i // full * row + i % full * block_size for i in many)
            rest = (r * row + full * block_size for r in more)
            for starts, width in ((whole, block_size), (rest, left)):
                while some := list(itertools.islice(starts, batch_size)):
                    yield self.cut([shard] * len(some), some, width)

    def layout(self, block_size, limit):
        """Yields for each shard: itself, ids in a row, full windows in a row, targets left after those, and, as ranges, which of all
        full windows and which of all rests are taken."""
        every = -(-int(((self.rows - 1) * self.counts).sum()) // limit) if limit else 1
        for shard, row, count in zip(self.shards, self.rows.tolist(), self.counts.tolist()):
            full, left = divmod(max(row - 1, 0), block_size)
            yield shard, row, full, left, range(0, count * full, max(every, 1)), range(0, count if left else 0, max(every, 1))

    def targets(self, block_size, limit=0):
        """How many targets windows() yields."""
        return sum(len(many) * block_size + len(more) * left for _, _, _, left, many, more in self.layout(block_size, limit))

    def cut(self, shards, starts, width):
        """(x, y), both (B, width): the window of each shard that begins at its start."""
        rows = self.tensor(np.stack([shard[i:i + width + 1] for shard, i in zip(shards, starts)])) # (B, width + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def tensor(self, ids):
        """ids as int64. One outside the vocabulary is refused here: inside the embedding it would be an IndexError, or crash a GPU."""
        if (top := ids.max()) >= self.vocab_size:
            raise UserError(f"{self.label}: id {top} found, expected ids below vocab_size={self.vocab_size}\n"
                            "the shards do not belong to this tokenizer: see python data.py verify NAME, and prepare the dataset again")
        return torch.from_numpy(ids.astype(np.int64))

    def too_short(self, block_size):
        n = int(self.rows.max(initial=0)) # of several shards the longest counts
        rows = "rows of " if any(self.counts > 1) else ""
        lower = f"lower --block_size to {n - 1} or " if n > 1 else ""
        more = "take longer rows" if rows else "raise --val_fraction" if self.label.startswith("val") else "take a longer text"
        return UserError(f"{self.label} has {rows}{n} tokens, block_size is {block_size}: {lower}{more}")

# --- downloads ---

class DownloadError(UserError):
    """A file could not be had. Says from where, why, and what to do without a network."""

def fetch(url, filename, sha256, data_dir="data"):
    """The path of filename in data_dir, with the given sha256: it lies there, or in the folder DATA_MIRROR, or is downloaded.
    Raises UserError if the name or the file there is wrong, DownloadError if it cannot be had."""
    target, named = Path(data_dir) / filename, re.fullmatch(r"\w[\w.-]{0,100}", filename, re.ASCII)
    if named and has_hash(target, sha256): # through a link, too
        return target
    if not named or target.resolve().parent != Path(data_dir).resolve():
        raise UserError(f"{filename!r} is not the name of a file inside {data_dir}/: nothing was downloaded")
    part, mirrored = target.with_name(filename + ".part"), Path(os.environ.get("DATA_MIRROR") or data_dir) / filename # no mirror: no file
    with writing(target), alone(target):
        if has_hash(target, sha256): # another process got it while this one waited
            return target
        if target.exists(): # perhaps a text that someone has edited, so it is not overwritten
            raise UserError(f"{target} has sha256 {sha256_of(target)}, expected {sha256}\n"
                            "delete it to get it anew, or rename it and prepare it by its path")
        if mirrored.exists() and not has_hash(mirrored, sha256):
            print(f"{mirrored} is not used: its sha256 is not {sha256}", file=sys.stderr)
        if has_hash(mirrored, sha256):
            shutil.copyfile(mirrored, part)
        elif problem := download(url, part, sha256):
            raise DownloadError(f"could not download {url}\n{problem}\n"
                                f"put {filename} into {data_dir}/ or set DATA_MIRROR to a folder that has it, with sha256 {sha256[:12]}...")
        os.replace(part, target) # whoever finds the file under its full name finds all of it
    return target

def download(url, part, sha256):
    """url into part, continuing what an earlier call left there. Returns None, or what was wrong in the end."""
    deadline, problem = time.monotonic() + _DEADLINE, None
    for attempt in range(_TRIES if not has_hash(part, sha256) else 0): # 0: a run killed before the rename left all of it
        try:
            problem, pause = receive(url, part, deadline)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            # these messages nest several objects, and end with what a person needs
            problem = " ".join(str(error).split("): ")[-1].strip("\"'()").split())[:160] or type(error).__name__
            pause = None if "resolve" in problem or isinstance(error, ValueError) else 0 # an unknown host stays unknown
        if has_hash(part, sha256): # asked of the bytes alone, whatever the server said about their number
            print(f"{part.stem}: {part.stat().st_size:,} bytes from {url}", file=sys.stderr)
            return None
        if problem is None: # all came, and it is wrong: nothing to continue
            problem = f"the {part.stat().st_size:,} bytes that came have sha256 {sha256_of(part)[:12]}..., expected {sha256[:12]}..."
            part.unlink()
        pause = pause or (pause == 0) * (0.5 * 2 ** attempt + random.SystemRandom().uniform(0, 0.2)) # random: not all clients at once
        if not pause or attempt == _TRIES - 1 or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
    return problem

def receive(url, part, deadline):
    """One request, appended to part. Returns (problem or None, seconds to wait: 0 for the usual, None if another attempt is no use)."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})} # identity: ranges count plain bytes
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        status, more = response.status_code, response.status_code == 206
        if have and status == 416: # there is nothing after what we have, so it was not the beginning of this file
            part.unlink()
            return f"the server cannot continue after {have} bytes", 0
        if status not in (200, 206):
            asked = response.headers.get("Retry-After", "")
            wait = int(asked) if asked.isdigit() else 0 # its other form, a date, is rare and gets the usual pause
            passes = status == 429 or status >= 500 # too many requests, or the server's own fault; what is 404 now will be 404 again
            return f"the server answered {status} {response.reason}", wait if passes and wait <= _PATIENCE else None
        with open(part, "ab" if more else "wb") as file: # 200 to a Range: the server ignored it and sends everything
            while block := response.raw.read1(2 ** 16, decode_content=False): # read1 does not wait for more: a trickle meets the deadline
                file.write(block)
                if sys.stderr.isatty():
                    print(f"{part.stem}: {file.tell():,} bytes", end="\r", file=sys.stderr) # the next print overwrites it
                if time.monotonic() > deadline:
                    return f"not finished after {_DEADLINE} seconds; the next call continues", None
    return None, 0

# --- command line ---

def prepared(data_dir):
    """The names of the folders in data_dir that look like datasets."""
    folders = sorted(Path(data_dir).iterdir()) if Path(data_dir).is_dir() else []
    return [f.name for f in folders if f.name[0] != "." and is_dataset(f)]

def summary(meta):
    kind, counts = (meta["tokenizer"] or {"name": "unknown"})["name"], count_tokens(meta["shards"])
    return f"tokenizer {kind}, vocab_size {meta['vocab_size']:,}, train {counts['train']:,} tokens, val {counts['val']:,} tokens"

def verify(name, data_dir="data"):
    """Reads all of a dataset. Returns a line for each file that is in order; UserError at the first that is not."""
    dataset, lines = load(name, data_dir), []
    for shard in dataset.train.shards + dataset.val.shards:
        path = dataset.folder / Path(shard.filename).name
        expected, actual = dataset.meta["shards"][path.name].get("sha256"), sha256_of(path)
        if expected and actual != expected:
            raise damaged(path, f"sha256 is {actual}, expected {expected}")
        if (top := highest(shard)) >= dataset.vocab_size:
            raise damaged(path, f"id {top} found, expected ids below vocab_size={dataset.vocab_size}")
        lines.append(f"OK {path}: {len(shard):,} tokens, highest id {top}, sha256 {actual[:12]}{'' if expected else ' (none stored)'}")
    return lines

def show_list(data_dir):
    print("known:")
    for name, source in DATASETS.items():
        print(f"  {name:<16} {source.__doc__}")
    print(f"prepared in {data_dir}/:")
    for name in prepared(data_dir):
        try:
            print(f"  {name:<16} {summary(load(name, data_dir).meta)}")
        except UserError as error: # one damaged dataset must not hide the others
            print(f"  {name:<16} {str(error).splitlines()[0]}")

def main(argv):
    first = next((i for i, arg in enumerate(argv) if arg.startswith("-")), len(argv)) # words, then options
    asks_help = "--help" in argv or "-h" in argv
    if asks_help:
        print(__doc__)
    configure(globals(), argv=argv[first:] if first or asks_help else []) # options without a verb before them: see usage
    verbs, verb = {"prepare": 2, "verify": 2, "list": 1}, argv[0] if first else "" # number of words with the verb itself
    if verbs.get(verb) != first:
        near = [] if verb in verbs else difflib.get_close_matches(verb, verbs, n=1, cutoff=0.5)
        raise UserError((f"no command {verb!r}, nearest: {near[0]}\n" if near else "")
                        + "usage: python data.py prepare SOURCE | verify NAME | list, then --tokenizer=, --val_fraction=, --data_dir=")
    if verb == "prepare":
        prepare(argv[1], tokenizer, data_dir, val_fraction)
    elif verb == "verify":
        print("\n".join(verify(argv[1], data_dir)))
    else:
        show_list(data_dir)

if __name__ == "__main__":
    main(sys.argv[1:])
