"""Every pre-tokenizer that llama.cpp knows: long words do not end the process, and words are those of std::regex."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "vendor" / "llama.cpp" / "src"
LONG = os.environ.get("MULLAMA_LONG") == "1"

needs_source = pytest.mark.skipif(not (SOURCE / "llama-vocab.cpp").exists(), reason="llama.cpp's source is not here")


def names() -> list[str]:
    """The values of ``tokenizer.ggml.pre`` that llama.cpp knows; one for each way, or all with MULLAMA_LONG=1."""
    source = (SOURCE / "llama-vocab.cpp").read_text(encoding="utf-8")
    found: list[str] = []
    for condition in re.findall(r"if \(([^;{}]*tokenizer_pre ==[^;{}]*)\) \{", source):
        of_one_way = re.findall(r'tokenizer_pre == "([^"]+)"', condition)
        found += of_one_way if LONG else of_one_way[:1]
    return sorted(set(found))


def expressions() -> list[str]:
    """Every regular expression of llama-vocab.cpp, escapes of C++ undone."""
    source = (SOURCE / "llama-vocab.cpp").read_text(encoding="utf-8")
    found: list[str] = []
    for block in re.findall(r"regex_exprs = \{(.*?)\n\s*\};", source, re.DOTALL):
        lines = [line for line in block.splitlines() if not line.strip().startswith("//")]
        for literal in re.findall(r'"((?:[^"\\]|\\.)*)"', "\n".join(lines)):
            text = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r", "t": "\t"}.get(m[1], m[1]), literal)
            found += [text] if text not in found else []
    return found


# -- the matcher beside std::regex ---------------------------------------------------------------------------------

#: As unicode_regex_split() does: categories are bytes that stand for them beyond ASCII, and their ASCII characters.
CATEGORIES = {
    "N": b"\xd1\x30-\x39",
    "L": b"\xd2\x41-\x5a\x61-\x7a",
    "P": b"\xd3\x21-\x23\x25-\x2a\x2c-\x2f\x3a-\x3b\x3f-\x40\\\x5b-\\\x5d\x5f\\\x7b\\\x7d",
    "M": b"\xd4",
    "S": b"\xd5\\\x24\\\x2b\x3c-\x3e\x5e\x60\\\x7c\\\x7e",
    **dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo"), b"\xd2\x41-\x5a\x61-\x7a"),
}


def collapsed(expression: str) -> bytes:
    out, is_inside, at = b"", False, 0
    while at < len(expression):
        char, before = expression[at], expression[at - 1 : at]
        if char in "[]" and before != "\\":
            is_inside = char == "["
        elif found := re.match(r"\\p\{(\w{1,2})\}", expression[at:]):
            body = CATEGORIES[found[1]]
            out += body if is_inside else b"[" + body + b"]"
            at += len(found[0])
            continue
        out += char.encode("ascii")
        at += 1
    return out


@needs_source
def test_matches_are_those_of_std_regex(tmp_path: Path) -> None:
    """2,000 random texts for each expression, or 100,000 with MULLAMA_LONG=1."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler")
    harness = Path(__file__).with_name("regex_harness.cpp")
    program = tmp_path / "harness"
    build = [compiler, "-std=c++17", "-O1", "-I", str(SOURCE), str(harness), "-o", str(program)]
    subprocess.run(build, check=True)
    files = []
    for n, expression in enumerate(expressions()):
        file = tmp_path / str(n)
        if "\\p{Han}" in expression or "\\p{AFMoE" in expression or "\\b" in expression or "\\u" in expression:
            continue  # only names of code of its own
        if "\\p{" in expression:
            file.write_bytes(b"c" + collapsed(expression))
        else:
            file.write_bytes(b"w" + expression.encode("utf-32-le"))
        files.append(str(file))
    assert len(files) >= 35
    command = [program, str(100_000 if LONG else 2_000), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- whole vocabularies --------------------------------------------------------------------------------------------


def byte_characters() -> list[str]:
    """GPT-2's characters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b if b in plain else 256 + sum(x not in plain for x in range(b))) for b in range(256)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``vocabulary(pre)``: a file without weights, all bytes and a few merges, for a pre-tokenizer."""
    folder = tmp_path_factory.mktemp("vocabularies")

    def build(pre: str) -> Path:
        path = folder / f"{re.sub('[^a-z0-9]', '_', pre.lower())}.gguf"
        writer = tiny._writer.GGUFWriter(str(path), "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(8)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        tokens = [*byte_characters(), "aa", "aaaa", "77", "ĠĠ", "ĊĊ", "!!", "<end>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 1) + [3])
        writer.add_token_merges(["a a", "aa aa", "7 7", "Ġ Ġ", "Ċ Ċ", "! !"])
        writer.add_eos_token_id(len(tokens) - 1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return build


CHILD = """
import sys
from mullama._core import Model
n = int(sys.argv[1])
runs = ["a", "A", "7", " ", "\\n", "!", " \\n", "aA", "a1", "'s"]
runs += ["\\u4e2d", "\\u0301", "\\u0436", "\\u0e01\\u0e31", "\\U0001f600"]
for path in sys.argv[2:]:
    print(path, flush=True)
    model = Model(path, vocab_only=True)
    for run in runs:
        text = run * (n // len(run))
        tokens = model.tokenize(text, add_special=False)
        assert len(tokens) >= n // 8 or run != "a", (run, len(tokens))
        del tokens
    model.close()
print("done", flush=True)
"""


@needs_source
def test_a_long_word_ends_no_process(vocabulary: Callable[[str], Path]) -> None:
    """Of each kind of character, under every name; in a child, for a stack that overflows is its end."""
    assert len(names()) >= (90 if LONG else 50)
    files = [str(vocabulary(name)) for name in names()]
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(CHILD), str(200_000 if LONG else 40_000), *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (done.stdout[-300:], done.stderr[-2000:])


FUZZER = """
import random, sys, time
from mullama._core import Model
seed, n_texts, most, patience = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
classes = ["abcxyz", "ABCXYZ", "0123456789", " ", "\\n", "\\r\\n", "\\t ", "'sS'tT'reLLvem'D",
           "!#%&()*+,-./:;<=>?@[]^_{|}~", "\\u4e2d\\u6587",
           "\\u3042\\u30ab", "\\ud55c", "\\u0436\\u0416", "\\u0e01\\u0e31", "\\u0915\\u0947", "\\u0301\\u0308",
           "\\u00a0\\u3000\\u0085", "\\u0664",
           "\\u00b2\\u2167", "\\U0001f600\\u200d", "\\u2026\\u3002", "\\x00\\x01\\x0b\\x1f\\x7f",
           "\\ue000\\uffff\\U0010ffff", "\\u01c5\\u02b0"]
for path in sys.argv[5:]:
    random.seed(seed)
    model = Model(path, vocab_only=True)
    for i in range(n_texts):
        size, parts, total = random.choice((1, 20, 300, most)), [], 0
        while total < size:
            characters, n = random.choice(classes), random.choice((1, 1, 2, 7, 60, most // 2))
            n = min(n, size - total)
            run = (characters * (n // len(characters) + 1))[:n]
            parts.append(run if n > 20 else "".join(random.choices(characters, k=n)))
            total += n
        text = "".join(parts)
        print(path, seed, i, flush=True)  # the last line says which one it was
        began = time.process_time()  # a busy machine does not count
        tokens = model.tokenize(text, add_special=False)
        assert time.process_time() - began <= patience, (len(text), time.process_time() - began)
        if i % 4 == 0:
            again = model.detokenize_bytes(tokens)
            assert again == text.encode() or len(again) < len(text.encode()), text[:80]
    model.close()
print("done", flush=True)
"""


@needs_source
def test_random_texts_with_long_runs_of_one_kind(vocabulary: Callable[[str], Path]) -> None:
    """A few texts of each way; with MULLAMA_LONG=1 a thousand of every name, up to 200,000 characters, none over 2 s.

    What comes back is what went in, but for vocabularies that have no bytes.
    """
    size, n_texts, patience = (200_000, 1_100, 2.0) if LONG else (20_000, 6, 600.0)
    files = [str(vocabulary(name)) for name in names()]
    for n, start in enumerate(range(0, len(files), 8)):
        settings = [str(n), str(n_texts), str(size), str(patience)]
        command = [sys.executable, "-P", "-c", FUZZER, *settings, *files[start : start + 8]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.endswith("done\n"), (done.stdout[-200:], done.stderr[-2000:])
