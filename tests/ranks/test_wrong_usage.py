"""Wrong command lines of every command: one line, exit code 2, no weight read.

Each says what must hold, what was given and what to do. The lines of a command run one
after the other in one process (`tests/support/usage.py`), every tenth on two ranks.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.ranks import run_commands
from tests.support.usage import outcomes_of

pytestmark = pytest.mark.requires("ranks")

# Command -> lines of options and what is said. {DIR} is a folder with `_files` in it.
GENERATE = [
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("extra words", "unrecognized arguments: extra words"),
    ("--model ''", "--model: must not be empty"),
    ("--model /no/such", "there is no folder '/no/such'"),
    ("--model no/such/thing/here", "there is no folder 'no/such/thing/here'"),
    ("--model {DIR}/empty", "--model must be a model folder"),
    ("--model {DIR}", "has no config.json"),
    ("--revision main --model {DIR}/tiny", "--revision is of a hub repository"),
    ("--adapter-path x", "Fuse it into the model first"),
    ("--prompt ''", "must not be empty"),
    ("--prompt ' '", "must not be empty"),
    ("--prompt-file /no/such", "--prompt-file: [Errno 2] No such file"),
    ("--prompt-file {DIR}", "--prompt-file: [Errno 21] Is a directory"),
    ("--prompt-file {DIR}/long", "--prompt must fit the model's context of 4096"),
    ("--prompts-file {DIR}/long.jsonl", "--prompts-file must fit the model's context"),
    ("--prompt-file {DIR}/latin", "--prompt-file must be text in UTF-8"),
    ("--prompt-file {DIR}/empty", "must not be empty"),
    ("-p a --prompt-file {DIR}/text", "got --prompt and --prompt-file"),
    ("-p a --prompts-file {DIR}/text", "got --prompt and --prompts-file"),
    ("--prompts-file {DIR}/latin", "--prompts-file must be text in UTF-8"),
    ("--prompts-file {DIR}/empty", "at least one prompt"),
    ("--prompts-file {DIR}/key.jsonl", "line 2 may have the keys prompt, messages"),
    ("--prompts-file {DIR}/id.jsonl", "'a' is that of line 1 too"),
    ("--prompts-file {DIR}/both.jsonl", "and not both"),
    ("--prompts-file {DIR}/temp.jsonl", '"temp" must be 0 or more, got -1'),
    ("--prompts-file {DIR}/tokens.jsonl", '"max_tokens" must be a whole number'),
    ("--prompts-file {DIR}/role.jsonl", '"messages" must be a list of objects'),
    ("--prompts-file {DIR}/top_k.jsonl", "--top-k must be below"),
    ("--prompts-file {DIR}/text --output {DIR}", "--output must be a"),
    ("--prompts-file {DIR}/text --output /no/such/x", "that can be written"),
    ("--prompts-file {DIR}/text --output {DIR}/text", "Give --resume"),
    ("--prompts-file {DIR}/text --json x", "give --output instead"),
    ("--prompts-file {DIR}/text --kv-bits 4", "does not go with --prompts-file"),
    ("--output x", "--output is where the answers"),
    ("--resume", "it needs --output"),
    ("--json /no/such/x", "--json must be a file in a folder"),
    ("--json {DIR}", "--json must be a file in a folder"),
    ("--batch-size 0", "must be 1 or more, got 0"),
    ("--verbose maybe", "must be True, T, False or F; got 'maybe'"),
    ("--log-level loud", "invalid choice: 'loud'"),
    ("--chat-template-config {{", "must be a JSON object"),
    ("--chat-template-config [1]", "must be a JSON object"),
    ("--extra-eos-token no-such-token", "got 'no-such-token', which its tokenizer"),
    ("--extra-eos-token 99999999", "must be tokens of the model"),
    ("--max-tokens 0", "must be 1 or more, got 0"),
    ("--max-tokens 1.5", "must be a whole number, got '1.5'"),
    ("--temp -1", "must be 0 or more, got -1"),
    ("--temp nan", "must be 0 or more, got nan"),
    ("--top-p 1.5", "must be between 0 and 1, got 1.5"),
    ("--min-p -0.1", "must be between 0 and 1, got -0.1"),
    ("--top-k -1", "must be 0 or more, got -1"),
    ("--top-k 100000", "below the number of the model's tokens, 1024; got 100000"),
    ("--min-tokens-to-keep -3", "must be 1 or more, got -3"),
    ("--min-tokens-to-keep 2000", "--min-tokens-to-keep must be below"),
    ("--xtc-probability 2", "must be between 0 and 1, got 2"),
    ("--xtc-threshold 0.9", "must be between 0 and 0.5, got 0.9"),
    ("--seed -1", "must be from 0 to 18446744073709551615, got -1"),
    ("--seed 10000000000000000000000", "must be from 0 to 18446744073709551615"),
    ("--seed x", "must be a whole number, got 'x'"),
    ("--kv-bits 7", "invalid choice: 7"),
    ("--kv-bits 4 --model {DIR}/tiny", "cannot be quantized with --kv-bits 4"),
    ("--kv-bits 4 --max-kv-size 10", "does not go with --max-kv-size"),
    ("--kv-group-size 48", "invalid choice: 48"),
    ("--max-kv-size 0", "must be 1 or more, got 0"),
    ("--prefill-step-size 0", "must be 1 or more, got 0"),
    ("--quantized-kv-start -1", "must be 0 or more, got -1"),
    ("--draft-model /no/such", "--draft-model must be a model folder"),
    ("--draft-runner blas", "it needs --draft-model"),
    ("--draft-runner fast --draft-model jargon-moe", "invalid choice: 'fast'"),
    ("--draft-runner metal --draft-model jargon-moe", "through Metal here"),
    ("--num-draft-tokens 0", "must be 1 or more, got 0"),
    ("--prompt-cache-file /no/such", "--prompt-cache-file must be a file"),
    ("--prompt-cache-file {DIR}/text", "is not one that cache_prompt made"),
    ("--prompt-cache-file x --attention tensor", "goes with --attention replicated"),
    ("--ranks 0", "must be 1 or more, got 0"),
    ("--ranks 7", "the number of ranks asked for must be the number started, got 7"),
    ("--strategy foo", "invalid choice: 'foo'"),
    ("--strategy gathered", "--strategy replicated goes with"),
    ("--dispatch-dtype int8", "needs rows that travel"),
    ("--dispatch-dtype fp8", "invalid choice: 'fp8'"),
    ("--strategy normal --mode low_latency", "Give one of the two"),
    ("--attention data", "it needs --prompts-file"),
    ("--attention tensor --strategy gathered", "needs the same tokens on all ranks"),
    ("--mode fast", "invalid choice: 'fast'"),
    ("--low-latency-tokens 0", "must be 1 or more, got 0"),
    ("--round-tokens -1", "must be 1 or more, got -1"),
    ("--sums x", "invalid choice: 'x'"),
    ("--capacity 0", "must be 1 or more, got 0"),
    ("--reduction x", "invalid choice: 'x'"),
    ("--shared-routing x", "invalid choice: 'x'"),
    ("--runner fast", "invalid choice: 'fast'"),
    ("--runner metal", "--runner metal needs a GPU"),
    ("--backend metal", "--backend metal needs a GPU"),
    ("--backend x", "invalid choice: 'x'"),
    ("--memory 0", "must be GB per rank, such as 512,128,64; got '0'"),
    ("--memory a,b", "must be GB per rank"),
    ("--memory 1,2,3,4,5", "must name one number per rank"),
    ("--memory-limit-gb 0", "must be a number above 0, got 0"),
    ("--memory-limit-gb inf", "must be a number above 0, got inf"),
    ("--memory-limit-gb 0.0001", "0.10 MB are to be had"),
    ("--placement /no/such", "cannot be read here"),
    ("--placement {DIR}/empty", "is not valid JSON"),
    ("--placement x --ep 1", "cannot be combined with memory or ep_size"),
    ("--ep 0", "must be 1 or more, got 0"),
    ("--ep 5", "--ep must be a number of equal groups"),
    ("--context -1", "must be 0 or more, got -1"),
    ("--download some", "invalid choice: 'some'"),
]  # fmt: skip
CHAT = [
    ("--pipeline", "unrecognized arguments: --pipeline"),
    ("--seed -1", "must be from 0 to"),
    ("--max-tokens 0", "must be 1 or more, got 0"),
    ("--top-k 100000", "below the number of the model's tokens"),
    ("--xtc-threshold 0.6", "must be between 0 and 0.5, got 0.6"),
    ("--strategy deepep", "--strategy replicated goes with"),
    ("--kv-bits 4 --max-kv-size 9", "does not go with"),
    ("--kv-bits 4 --model {DIR}/tiny", "cannot be quantized with"),
    ("--backend metal", "needs a GPU"),
    ("--model /no/such", "there is no folder '/no/such'"),
]
PERPLEXITY = [
    ("--sequence-length 1", "--sequence-length must be 2 or more, got 1"),
    ("--sequence-length 99999999", "at least --sequence-length 99999999 tokens"),
    ("--num-samples 0", "--num-samples must be 1 or more, or -1; got 0"),
    ("--batch-size 0", "must be 1 or more, got 0"),
    ("--text /no/such", "--text: [Errno 2] No such file"),
    ("--text {DIR}/latin", "--text must be text in UTF-8"),
    ("--text {DIR}/empty", "must have at least --sequence-length 512 tokens"),
    ("--strategy gathered", "--strategy replicated goes with"),
    ("--json /no/such/x", "--json must be a file"),
]
LONG = "kludge " * 5000
CACHE_PROMPT = [
    ("--prompt x", "required: --prompt-cache-file"),
    ("--prompt-cache-file {DIR}/x", "required: --prompt"),
    ("--prompt-cache-file {DIR}/x --prompt ''", "must not be empty"),
    ("--prompt-cache-file {DIR} --prompt x", "must be a file in a folder"),
    (f"--prompt-cache-file {{DIR}}/x --prompt '{LONG}'", "context of 4096 tokens"),
    ("--prompt-cache-file /no/such/x --prompt x", "must be a file in a folder"),
    ("--prompt-cache-file {DIR}/x --prompt x --eos-token no", "a token of the model"),
    ("--prompt-cache-file {DIR}/x --prompt x --attention tensor", "replicated"),
    ("--prompt-cache-file {DIR}/x --prompt x --kv-bits 4 --kv-group-size 128",
     "cannot be quantized"),
]  # fmt: skip
MODEL = "--model jargon-moe"
PLAN = [
    ("", "required: --model"),
    ("--model /no/such --ranks 2", "there is no folder '/no/such'"),
    (MODEL, "Say how many Macs"),
    (f"{MODEL} --ranks 0", "must be 1 or more, got 0"),
    (f"{MODEL} --ranks 2 --memory 1", "--memory must name one number per rank"),
    (f"{MODEL} --memory x", "must be GB per rank"),
    (f"{MODEL} --ranks 2 --context 0", "must be 1 or more, got 0"),
    (f"{MODEL} --ranks 2 --sequences 0", "must be 1 or more, got 0"),
    (f"{MODEL} --ranks 2 --kv-bits 7", "invalid choice: 7"),
    (f"{MODEL} --ranks 2 --kv-bits 4", "cannot be quantized with --kv-bits 4"),
    (f"{MODEL} --ranks 2 --kv-group-size -1", "invalid choice: -1"),
    (f"{MODEL} --ranks 2 --quantized-kv-start -1", "must be 0 or more, got -1"),
    (f"{MODEL} --ranks 2 --prefill-step-size 0", "must be 1 or more, got 0"),
    (f"{MODEL} --ranks 2 --chip m99", "got 'm99'"),
    (f"{MODEL} --ranks 2 --chip m3-ultra,m3-ultra,m3-ultra", "or one per rank (2)"),
    (f"{MODEL} --ranks 2 --chip m3-ultra --link x", "has no link 'x'"),
    (f"{MODEL} --ranks 2 --chip m3-ultra --profile x", "not both"),
    (f"{MODEL} --ranks 2 --profile /no/such", "must be a file, or one of"),
    (f"{MODEL} --ranks 2 --json /no/such/x", "--json must be a file in a folder"),
    (f"{MODEL} --ranks 2 --write-placement /no/such/x", "--write-placement must be a"),
    (f"{MODEL} --ranks 2 --placement /no/such", "cannot be read here"),
    (f"{MODEL} --ranks 3 --ep 2", "equal groups of the 3 ranks"),
    (f"{MODEL} --ranks 2 --attention data", "invalid choice: 'data'"),
    (f"{MODEL} --ranks 3 --attention tensor", "cannot split this model over 3 ranks"),
]
DOCTOR = [
    ("--ranks x", "must be a whole number, got 'x'"),
    ("--foo", "unrecognized"),
    ("--model ''", "--model: must not be empty"),
    ("--model /no/such", "there is no folder '/no/such'"),
    ("--json /no/such/x", "--json must be a file in a folder"),
]
CALIBRATE = [
    ("--packings x", "--packings must be some of"),
    ("--widths 100,100", "--widths must be two multiples of 256"),
    ("--output {DIR}", "--output must be a file"),
    ("--output /no/such/profile.json", "--output must be a file in a folder"),
]
OVERLAY = [
    ("", "required: model"),
    ("/no/such", "there is no folder"),
    ("jargon-moe --no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("jargon-moe --ranks 0", "must be 1 or more, got 0"),
    ("jargon-moe --output {DIR}", "must be a new or empty folder"),
    ("jargon-moe --output /proc/x/y", "--output must be a folder that can be written"),
    ("jargon-moe --strategy gathered --output {DIR}/o", "--strategy replicated only"),
]
BENCHMARK = [
    ("", "required: LEVEL"),
    ("layers", "invalid choice: 'layers'"),
    ("layer --shape x", "got 'x'"),
    ("layer --tokens 0", "--tokens must be whole numbers from 1 on"),
    ("layer --scale 0", "must be 1 or more, got 0"),
    ("layer --skew -1", "must be 0 or more, got -1"),
    ("layer --arms foo", "got 'foo'"),
    ("layer --arms tp", "There is no arm tp here"),
    ("layer --runner foo", "got 'foo'"),
    ("layer --budget -1", "must be 0 or more, got -1"),
    ("layer --seed -1", "must be 0 or more, got -1"),
    ("layer --memory-limit-gb 0", "must be a number above 0, got 0"),
    ("layer --json /no/such/x", "--json must be a file in a folder"),
    ("layer --json {DIR}", "--json must be a file"),
    ("layer --plot /no/such/x.png", "--plot must be a file in a folder"),
    ("layer --plot {DIR}/x.foo", "--plot must end in .png, .pdf, .svg"),
    ("e2e --model /no/such", "there is no folder '/no/such'"),
    ("e2e --batch 0", "--batch must be whole numbers from 1 on"),
    ("e2e --prompt-tokens 0", "must be 1 or more, got 0"),
    ("e2e --max-tokens 1", "--max-tokens must be 2 or more"),
    ("e2e --runner gather,blas", "takes one --runner"),
]
# Command -> (where its main is, its lines).
TABLE = {
    "mlx_ep.generate": ("mlx_ep.generate", GENERATE),
    "mlx_ep.chat": ("mlx_ep.chat", CHAT),
    "mlx_ep.perplexity": ("mlx_ep.perplexity", PERPLEXITY),
    "mlx_ep.cache_prompt": ("mlx_ep.cache_prompt", CACHE_PROMPT),
    "mlx_ep.plan": ("mlx_ep.plan.__main__", PLAN),
    "mlx_ep.doctor": ("mlx_ep.doctor", DOCTOR),
    "mlx_ep.calibrate": ("mlx_ep.calibrate", CALIBRATE),
    "mlx_ep.overlay": ("mlx_ep.overlay.make", OVERLAY),
    "mlx_ep.benchmark": ("mlx_ep.benchmark.__main__", BENCHMARK),
}
PROMPT = {"prompt": "x"}
_FILES = {
    "text": "a prompt",
    "empty": "\n",
    "long": LONG,
    "long.jsonl": [PROMPT, {"prompt": LONG}],
    "key.jsonl": [PROMPT, {**PROMPT, "foo": 1}],
    "id.jsonl": [{**PROMPT, "id": "a"}, {**PROMPT, "id": "a"}],
    "both.jsonl": [{**PROMPT, "messages": []}],
    "temp.jsonl": [{**PROMPT, "temp": -1}],
    "tokens.jsonl": [{**PROMPT, "max_tokens": 1.5}],
    "role.jsonl": [{"messages": [{"role": "user"}]}],
    "top_k.jsonl": [{**PROMPT, "top_k": 5000}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usage")
    for name, content in _FILES.items():
        if not isinstance(content, str):
            content = "\n".join(map(json.dumps, content))
        (folder / name).write_text(content)
    (folder / "latin").write_bytes("café café".encode("latin-1"))
    tiny.save_checkpoint(folder / "tiny", tiny.QWEN3_MOE)  # heads of 16
    return folder


def check(num_ranks: int, command: str, step: int, folder: Path) -> None:
    module, cases = TABLE[command]
    cases = cases[::step]
    lines = [shlex.split(line.format(DIR=folder)) for line, _ in cases]
    found = outcomes_of(num_ranks, lines, command, module, reads=False)
    for line, (_, text), ranks in zip(lines, cases, found, strict=True):
        assert [code for code, _ in ranks] == [2] * num_ranks, (line, ranks)
        said = ranks[0][1]
        assert text in said, (line, said)
        assert len(said.splitlines()) == 1, (line, said)
        assert said.startswith(f"{command}"), (line, said)
        assert ": error: " in said and "Traceback" not in said, (line, said)
        assert all(printed == "" for _, printed in ranks[1:]), (line, ranks)


def test_the_table_is_long_enough() -> None:
    assert sum(len(cases) for _, cases in TABLE.values()) >= 120


@pytest.mark.parametrize("command", TABLE)
def test_one_rank(command: str, folder: Path) -> None:
    check(1, command, 1, folder)


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("mlx_ep.generate", 7),
        ("mlx_ep.perplexity", 4),
        ("mlx_ep.cache_prompt", 4),
        ("mlx_ep.calibrate", 3),
        ("mlx_ep.overlay", 1),
    ],
)
def test_two_ranks(command: str, step: int, folder: Path) -> None:
    check(2, command, step, folder)


def test_backends_of_the_environment() -> None:
    for value, text in (
        ("foo", "MLX_EP_BACKEND must be cpu, metal or auto; got 'foo'"),
        ("metal", "MLX_EP_BACKEND=metal needs a GPU"),
    ):
        ((outcome,),) = outcomes_of(1, [[]], env={"MLX_EP_BACKEND": value}, reads=False)
        assert outcome[0] == 2 and text in outcome[1], outcome
        assert len(outcome[1].splitlines()) == 1


def test_a_standard_input_that_is_not_utf_8() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_ep.generate", "--prompt", "-"],
        input="café".encode("latin-1"),
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"The standard input must be text in UTF-8" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_results_as_json(tmp_path: Path) -> None:
    """--json of generate and perplexity; "-" leaves the standard output to it."""
    generate = [sys.executable, "-m", "mlx_ep.generate", "--max-tokens", "4"]
    (outcome,) = run_commands(1, [*generate, "--json", "-"])
    record = json.loads(outcome.stdout)
    assert record["generation_tokens"] == 4 and record["finish_reason"] == "length"
    assert record["text"] and record["model"] == "jargon-moe" and record["ranks"] == 1
    file = tmp_path / "perplexity.json"
    perplexity = [sys.executable, "-m", "mlx_ep.perplexity", "--sequence-length", "64"]
    (outcome,) = run_commands(1, [*perplexity, "--json", str(file)])
    record = json.loads(file.read_text())
    assert f"Perplexity: {record['perplexity']:.3f}" in outcome.stdout
