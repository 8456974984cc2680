"""What can't be served is refused in one line that names the remedy, and what goes on beside it is not disturbed."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from conftest import COMMON, CONFIGS, make_model
from safetensors.torch import load_file, save_file

from drex import EarlyExit, SamplingParams
from drex.config.early_exit_json import EARLY_EXIT_FILE
from drex.llm import LLM

EXITS = EarlyExit(layers=[2, 4], thresholds=0.5)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18]]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


@contextlib.contextmanager
def refused(*words):
    """A ValueError of one line, which has all of `words` in it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        yield
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert 10 < len(message) < 500
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def llm(models):
    return LLM(models["llama"], early_exit=EXITS, dtype="float64", max_model_len=32, kv_cache_tokens=64)


@pytest.fixture(scope="module")
def expected(llm):
    """What the prompts give when nothing goes wrong."""
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Whatever was refused or failed, the shared engine holds nothing afterwards."""
    yield
    if "llm" in request.fixturenames:
        served = request.getfixturevalue("llm")
        served.engine.scheduler.check_integrity()
        assert not served.engine.busy
        assert served.engine.scheduler.pool.in_use == served.engine.scheduler.pool.claimed == 0


# Prompts

BAD_PROMPTS = [
    ([[]], ["empty", "at least one token"]),
    ([[5] * 32], ["32 tokens", "maximum context length is 32 tokens (max_model_len)", "shorten the prompt"]),
    ([[5] * 500], ["500 tokens", "maximum context length is 32", "shorten the prompt"]),
    ([[5, 97]], ["token id 97", "0..96"]),
    ([[5, -1]], ["token id -1", "0..96"]),
    ([[5, 10**30]], ["token id 1000", "0..96"]),
    ([[5, 1.0]], ["token id 1.0", "0..96"]),
    ([[5, True]], ["token id True", "0..96"]),
    ([[5, "6"]], ["token id '6'", "0..96"]),
    ([[5, None]], ["token id None", "0..96"]),
]


@pytest.mark.parametrize(("prompt", "words"), BAD_PROMPTS, ids=lambda value: str(value)[:20])
def test_bad_prompts(llm, prompt, words):
    with refused(*words):
        llm.generate(prompt, GREEDY)
    with refused(*words):
        llm.generate([PROMPTS[0], *prompt, PROMPTS[1]], GREEDY)
    with refused(*words):
        llm.stream([PROMPTS[0], *prompt], GREEDY)


def test_the_longest_prompt_is_served(llm):
    [output] = llm.generate([[5] * 31], GREEDY)
    assert len(output.outputs[0].tokens) == 1


def test_text_needs_a_tokeniser_and_chat_a_template(llm, text_model, tmp_path):
    with refused("no tokeniser", "token ids"):
        llm.generate("text", GREEDY)
    with refused("no chat template", "use generate"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY)
    served = LLM(text_model, policy="full", dtype="float32")
    with refused("empty", "at least one token"):
        served.generate("", GREEDY)
    with refused("messages is empty"):
        served.chat([[]], GREEDY)
    served.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with refused("chat template", "roles must alternate"):
        served.chat([{"role": "user", "content": "x"}], GREEDY)


def test_one_params_too_few(llm):
    with refused("2 sampling_params for 4 prompts", "one a prompt"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], ["at least 2 tokens"]),
        ([5], ["at least 2 tokens"]),
        ([[5, 6], [7]], ["at least 2 tokens"]),
        ([5] * 33, ["33 tokens", "maximum context length is 32", "shorten"]),
        ([5, 97], ["token id 97", "0..96"]),
        ([5, -3], ["token id -3", "0..96"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_sequences_to_score(llm, ids, words):
    with refused(*words):
        llm.score(ids)


# Parameters

NAN, INFINITE = float("nan"), float("inf")


OUT_OF_RANGE = [
    ("n", [0, -1, 1.5, "2", None, True], "from 1 on"),
    ("temperature", [-0.1, 2.1, NAN, INFINITE, None, "1", 10**400], "in [0, 2]"),
    ("top_p", [0, -0.5, 1.01, NAN, None, 10**400], "in (0, 1]"),
    ("top_k", [-2, 1.5, NAN, None], "whole number"),
    ("min_p", [-0.1, 1.1, NAN, None], "in [0, 1]"),
    ("repetition_penalty", [0, -1, 2.1, NAN, INFINITE, None], "in (0, 2]"),
    ("presence_penalty", [-2.1, 2.1, NAN, None], "in [-2, 2]"),
    ("frequency_penalty", [-2.1, 2.1, NAN, None], "in [-2, 2]"),
    ("seed", [1.5, "1", NAN, True], "whole number"),
    ("max_tokens", [0, -1, 1.5, NAN, None], "from 1 on"),
    ("min_tokens", [-1, 17, 1.5, None], "give"),
    ("logprobs", [-1, 21, 1.5, True, "1"], "from 0 to 20"),
    ("prompt_logprobs", [-1, 21, 1.5, True, "1"], "from 0 to 20"),
    ("stop", ["", ["a", ""], [1], 5], "non-empty strings"),
    ("stop_token_ids", [["a"], [1.5], [True], 5], "token ids"),
    ("logit_bias", [{1: 101}, {1: NAN}, {1: None}, {1: 10**400}, {"1": 1.0}, {1.5: 1.0}, [1]], "[-100, 100]"),
]


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [(name, value, remedy) for name, values, remedy in OUT_OF_RANGE for value in values],
    ids=lambda value: str(value)[:20],
)
def test_parameters_out_of_range(name, value, remedy):
    with refused(name, remedy):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logit_bias": {97: 1.0}}, ["logit_bias", "token 97", "0..96"]),
        ({"logit_bias": {5: 1.0, -1: 1.0}}, ["logit_bias", "token -1", "0..96"]),
        # Under min_tokens these are banned, that is: looked up in the logits.
        ({"stop_token_ids": [5, 97], "min_tokens": 2}, ["stop_token_ids", "97", "0..96"]),
        ({"stop_token_ids": [-1], "min_tokens": 2}, ["stop_token_ids", "-1", "0..96"]),
        ({"early_exit": EarlyExit(layers=[99])}, ["layers [99]", "exits after layers [2, 4]"]),
        ({"early_exit": EarlyExit(kv_fill="mask")}, ["kv_fill", "leave it out of the request"]),
        ({"early_exit": EarlyExit(thresholds=[0.5])}, ["one for each of 2 exits"]),
        ({"early_exit": EarlyExit(criterion="probe")}, ["probe", "another criterion"]),
    ],
    ids=str,
)
def test_parameters_that_this_model_cannot_serve(llm, settings, words):
    with refused(*words):
        llm.generate(PROMPTS, SamplingParams(max_tokens=5, **settings))


def test_scoring_by_a_probe_that_there_is_not(llm):
    with refused("probe", "another criterion"):
        llm.score([5, 6, 7], early_exit=EarlyExit(criterion="probe"))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"layer": [2]}, ["unknown field layer", "known: layers"]),
        ({"layers": [2], "treshold": 0.5, "x": 1}, ["unknown field treshold, x", "thresholds"]),
        ({"criterion": "maxprob"}, ["criterion 'maxprob'", "max_prob"]),
        ({"kv_fill": "copy"}, ["kv_fill 'copy'", "recompute"]),
        ({"schedule": "linear"}, ["schedule 'linear'", "calm_paper"]),
        ({"thresholds": NAN}, ["threshold nan", "from 0 on"]),
        ({"thresholds": -0.1}, ["threshold -0.1", "from 0 on"]),
        ({"thresholds": INFINITE}, ["threshold inf", "from 0 on"]),
        ({"thresholds": [0.5, NAN]}, ["threshold nan", "from 0 on"]),
        ({"thresholds": "0.5"}, ["threshold", "from 0 on"]),
        ({"thresholds": True}, ["threshold True", "from 0 on"]),
        ({"patience": 0}, ["patience 0", "at least 1"]),
        ({"min_layer": -1}, ["min_layer -1", "from 0 on"]),
        # Of a wrong type, as they may come in JSON.
        ({"thresholds": 10**400}, ["threshold"]),
        ({"thresholds": {"2": 0.5}}, ["threshold"]),
        ({"layers": 2}, ["layers"]),
        ({"layers": ["a"]}, ["layers"]),
        ({"layers": [2.5]}, ["layers"]),
        ({"patience": "2"}, ["patience"]),
        ({"min_layer": "2"}, ["min_layer"]),
        ({"min_layer": None}, ["min_layer"]),
        ({"enabled": "no"}, ["enabled"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_early_exit_settings(raw, words):
    with refused(*words):
        EarlyExit.from_dict(raw)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 0}, ["max_model_len is 0", "at least 1"]),
        ({"max_num_seqs": 0}, ["max_num_seqs is 0", "at least 1"]),
        ({"max_num_batched_tokens": -4}, ["max_num_batched_tokens is -4", "at least 1"]),
        ({"max_fill_rows": 0}, ["max_fill_rows is 0", "at least 1"]),
        ({"max_wait_passes": 0}, ["max_wait_passes is 0", "at least 1"]),
        ({"kv_cache_tokens": 1}, ["kv_cache_tokens is 1", "at least 2"]),
        ({"max_slowdown": 0.9}, ["max_slowdown is 0.9", "from 1 on"]),
        ({"max_slowdown": NAN}, ["max_slowdown is nan", "from 1 on"]),
        ({"policy": "best"}, ["policy 'best'", "drex, split, full"]),
        ({"dtype": "int8"}, ["dtype 'int8'", "bfloat16"]),
        ({"device": "gpu"}, ["device 'gpu'", "cpu"]),
        ({"max_model_len": 65}, ["max_model_len is 65", "at most 64"]),
        ({"early_exit": EarlyExit(layers=[99], thresholds=0.5)}, ["layer 99", "6 layers", "1..5"]),
        ({"early_exit": EarlyExit(layers=[6], thresholds=0.5)}, ["layer 6", "1..5"]),
        ({"early_exit": EarlyExit(layers=[2])}, ["no thresholds", "one an exit"]),
        ({"early_exit": EarlyExit(thresholds=0.5)}, ["no exit points", "EarlyExit(layers="]),
        ({"early_exit": EarlyExit(layers=[2], thresholds=0.5, criterion="probe")}, ["probe", "exits.N.probe.weight"]),
    ],
    ids=str,
)
def test_bad_engine_settings(models, settings, words):
    with refused(*words):
        LLM(models["llama"], **settings)


# Model folders


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))


def edit_weights(path, **changes):
    tensors = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


WEIGHTS, SHARD, INDEX = "model.safetensors", "model-00002-of-", "model.safetensors.index.json"
UP = "model__layers__3__mlp__up_proj__weight"
BROKEN = {
    "truncated weights": (lambda f: cut(f / WEIGHTS, 0.5), [WEIGHTS, "corrupt", "fetch the model again"]),
    "truncated header": (lambda f: cut(f / WEIGHTS, 0.001), [WEIGHTS, "corrupt", "fetch the model again"]),
    "empty weights": (lambda f: cut(f / WEIGHTS, 0), [WEIGHTS, "corrupt", "fetch the model again"]),
    "text as weights": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs" * 9), [WEIGHTS, "corrupt"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["no model.safetensors", "convert the weights"]),
    "a tensor missing": (
        lambda f: edit_weights(f / WEIGHTS, **{UP: None}),
        ["no model.layers.3.mlp.up_proj.weight", "fetch it again"],
    ),
    "a tensor of another shape": (
        lambda f: edit_weights(f / WEIGHTS, **{UP: torch.zeros(3, 4)}),
        ["model.layers.3.mlp.up_proj.weight has shape [3, 4]", "[48, 32]", "do not belong together"],
    ),
    "config of another model": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=7),
        ["no model.layers.6", "fetch it again"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["not a model", "no config.json", "Hugging Face"]),
    "corrupt config": (lambda f: cut(f / "config.json", 0.5), ["config.json", "not readable", "fetch the model again"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["JSON object", "fetch the model again"]),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=None), ["not supported", "drex runs llama"]),
    "corrupt generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ["generation_config.json", "fetch the model again"],
    ),
    "corrupt tokeniser": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokeniser", "fetch the model again"]),
}
BROKEN_SHARDS = {
    "a shard missing": (
        lambda f: next(f.glob(SHARD + "*")).unlink(),
        [SHARD, "missing or corrupt", "fetch the model again"],
    ),
    "a shard truncated": (
        lambda f: cut(next(f.glob(SHARD + "*")), 0.3),
        [SHARD, "missing or corrupt", "fetch the model again"],
    ),
    "corrupt index": (lambda f: cut(f / INDEX, 0.5), [INDEX, "fetch the model again"]),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "fetch the model again"]),
    "index that lacks a shard": (
        lambda f: edit_json(f / INDEX, weight_map={"x": next(f.glob("model-00001-of-*")).name}),
        ["the weights have no", "fetch it again"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_model_folders(models, tmp_path, case):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    change, words = BROKEN[case]
    change(folder)
    with refused(*words):
        LLM(folder, dtype="float32")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return make_model(CONFIGS["llama"], tmp_path_factory.mktemp("sharded"), max_shard_size="20KB")


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards(sharded, tmp_path, case):
    folder = shutil.copytree(sharded, tmp_path / "model")
    change, words = BROKEN_SHARDS[case]
    change(folder)
    with refused(*words):
        LLM(folder, dtype="float32")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_tokeniser(text_model, tmp_path, share):
    folder = shutil.copytree(text_model, tmp_path / "model")
    cut(folder / "tokenizer.json", share)
    with refused("tokeniser", "fetch the model again"):
        LLM(folder, dtype="float32")


@pytest.mark.parametrize("end_token", [500, -1])
def test_end_tokens_outside_of_the_vocabulary_forbid_no_other_token(models, tmp_path, end_token):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end_token]}))
    params = SamplingParams(max_tokens=4, min_tokens=3, logit_bias={96: 100.0})
    done = LLM(folder, dtype="float32").generate([5], params)[0].outputs[0]
    assert (done.token_ids, done.error) == ([96] * 4, None)


def test_a_path_that_is_no_model(tmp_path):
    (tmp_path / "file").touch()
    with refused("not a model", "no config.json"):
        LLM(tmp_path)
    for name in (tmp_path / "file", tmp_path / "missing", "missing", "./a/b"):
        with refused(f"no model at {name}", "folder or a hub id"):
            LLM(name)


GOOD = {
    "version": 1,
    "exits": [{"layer": 2, "head": "shared"}, {"layer": 4, "head": "norm", "weights": "own.safetensors"}],
    "criterion": "max_prob",
    "thresholds": [0.5, 0.5],
    "kv_fill": "recompute",
    "guarantee": None,
}


def with_exit(**changes):
    return {"exits": [GOOD["exits"][0], {**GOOD["exits"][1], **changes}]}


BAD_EARLY_EXIT = {
    "not json": ("{", ["not readable as JSON", "name the exits"]),
    "not an object": ("[]", ["expected a JSON object"]),
    "version": ({"version": 2}, ["version 2", "reads version 1"]),
    "no version": ({"version": None}, ["version None", "reads version 1"]),
    "unknown field": ({"treshold": 1}, ["unknown field 'treshold'", "thresholds"]),
    "no exits": ({"exits": []}, ['"exits" must be a non-empty list']),
    "exits of another type": ({"exits": 4}, ['"exits" must be a non-empty list']),
    "an exit of another type": ({"exits": [2, 4]}, ['an entry of "exits" must be an object']),
    "unknown field of an exit": (with_exit(wieghts="x"), ["exits: unknown field 'wieghts'", "weights"]),
    "layer as text": (with_exit(layer="4"), ["\"layer\" must be a whole number, got '4'"]),
    "layer as boolean": (with_exit(layer=True), ['"layer" must be a whole number']),
    "layer the model lacks": (with_exit(layer=99), ["layer 99", "6 layers", "1..5"]),
    "last layer": (with_exit(layer=6), ["layer 6", "1..5"]),
    "layer zero": ({"exits": [{"layer": 0}], "thresholds": [0.5]}, ["layer 0", "1..5"]),
    "descending": ({"exits": [{"layer": 4}, {"layer": 2}]}, ["[4, 2]", "ascending and distinct"]),
    "twice": ({"exits": [{"layer": 2}, {"layer": 2}]}, ["[2, 2]", "ascending and distinct"]),
    "head kind": (with_exit(head="block"), ["\"head\" is 'block'", "shared, norm, linear, mlp"]),
    "head without weights": (with_exit(weights=None), ["a 'norm' head needs \"weights\""]),
    "weights of another type": (with_exit(head="shared", weights=3), ["name of a file in the model's folder"]),
    "weights outside": (with_exit(weights="../own.safetensors"), ["name of a file in the model's folder"]),
    "weights missing": (with_exit(weights="other.safetensors"), ["'other.safetensors' is missing from the folder"]),
    "criterion": ({"criterion": "best"}, ["\"criterion\" is 'best'", "max_prob"]),
    "kv_fill": ({"kv_fill": ["alias"]}, ['"kv_fill" is', "recompute"]),
    "too few thresholds": ({"thresholds": [0.5]}, ['"thresholds"', "one number for each of the 2 exits"]),
    "one threshold": ({"thresholds": 0.5}, ['"thresholds"', "one number for each of the 2 exits"]),
    "no thresholds": ({"thresholds": None}, ['"thresholds"', "one number for each of the 2 exits"]),
    "threshold NaN": ({"thresholds": [0.5, NAN]}, ["threshold nan", "from 0 on"]),
    "threshold infinite": ({"thresholds": [0.5, INFINITE]}, ["threshold inf", "from 0 on"]),
    "threshold negative": ({"thresholds": [0.5, -1]}, ["threshold -1", "from 0 on"]),
    "threshold as text": ({"thresholds": [0.5, "0.5"]}, ["threshold '0.5'", "from 0 on"]),
    "guarantee": ({"guarantee": 0.05}, ['"guarantee" must be an object or null']),
}


@pytest.mark.parametrize("case", BAD_EARLY_EXIT)
def test_bad_early_exit_files(models, tmp_path, case):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    save_file({"exits.4.norm.weight": torch.ones(COMMON["hidden_size"])}, folder / "own.safetensors")
    (folder / EARLY_EXIT_FILE).write_text(json.dumps(GOOD))
    assert LLM(folder, dtype="float32").model.exits.layers == (2, 4)
    content, words = BAD_EARLY_EXIT[case]
    (folder / EARLY_EXIT_FILE).write_text(content if isinstance(content, str) else json.dumps({**GOOD, **content}))
    with refused(EARLY_EXIT_FILE, *words):
        LLM(folder, dtype="float32")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"exits.4.head.weight": torch.ones(97, 32)}, ["no exits.4.norm.weight", "fetch it again"]),
        ({"exits.4.norm.weight": torch.ones(31)}, ["exits.4.norm.weight has shape [31]", "[32]"]),
        (None, ["own.safetensors", "corrupt", "fetch the model again"]),
    ],
    ids=["missing", "shape", "truncated"],
)
def test_bad_exit_weights(models, tmp_path, tensors, words):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    (folder / EARLY_EXIT_FILE).write_text(json.dumps(GOOD))
    save_file(tensors or {"exits.4.norm.weight": torch.ones(32)}, folder / "own.safetensors")
    if tensors is None:
        cut(folder / "own.safetensors", 0.8)
    with refused(*words):
        LLM(folder, dtype="float32")


# Capacity


def test_a_request_larger_than_the_pool_is_refused_and_the_largest_that_fits_is_served(models):
    llm = LLM(models["llama"], early_exit=EXITS, dtype="float32", kv_cache_tokens=16)
    whole = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    too_large = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    words = ("prompt (10)", "max_tokens (8)", "17 tokens", "holds 16", "raise kv_cache_tokens")
    with refused(*words):
        llm.generate([PROMPTS[0], [5] * 10], too_large)
    with refused(*words):
        next(llm.stream([5] * 10, too_large))
    assert not llm.engine.busy
    assert len(llm.generate([[5] * 10], whole)[0].outputs[0].tokens) == 7
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.pool.in_use == 0


# What goes on beside it


def run_engine(llm, limit=500):
    """Step until nothing is left; returns the finished samples by request id."""
    done = {}
    for _ in range(limit):
        if not llm.engine.busy:
            return done
        done.update({request_id: whole for request_id, _, whole in llm.engine.step() if whole is not None})
    raise AssertionError("the engine does not come to an end")


def ids_of(done, requests):
    return [done[request.request_id].token_ids for request in requests]


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        *((prompt[0], {}) for prompt, _ in BAD_PROMPTS),
        ([5] * 20, {"logit_bias": {97: 1.0}}),
        # These pass the checks of one field alone; what they would do shows in a pass, which they would take down.
        (PROMPTS[0], {"stop_token_ids": [97], "min_tokens": 3}),
        (PROMPTS[0], {"top_k": 2**63}),
        (PROMPTS[0], {"seed": 2**100, "ignore_eos": True}),
        (PROMPTS[0], {"early_exit": EarlyExit(criterion="probe", thresholds=0.5)}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_requests_beside_a_bad_one_go_on(llm, expected, prompt, settings):
    requests = [llm.inputs.requests(ids, GREEDY)[0] for ids in PROMPTS]
    for request in requests[:2]:
        llm.engine.add(request)
    llm.engine.step()
    with contextlib.suppress(ValueError):
        llm.engine.add(llm.inputs.requests(prompt, SamplingParams(max_tokens=5, **settings))[0])
    for request in requests[2:]:
        llm.engine.add(request)
    done = run_engine(llm)
    assert ids_of(done, requests) == expected
    assert all(sample.error is None for sample in done.values())


def test_requests_beside_one_too_large_go_on(models, expected):
    llm = LLM(models["llama"], early_exit=EXITS, dtype="float64", max_model_len=32, kv_cache_tokens=20)
    requests = [llm.inputs.requests(ids, GREEDY)[0] for ids in PROMPTS]
    for request in requests[:2]:
        llm.engine.add(request)
    llm.engine.step()
    with refused("raise kv_cache_tokens"):
        llm.engine.add(llm.inputs.requests([5] * 15, SamplingParams(max_tokens=10))[0])
    for request in requests[2:]:
        llm.engine.add(request)
    assert ids_of(run_engine(llm), requests) == expected
    assert llm.engine.scheduler.pool.in_use == 0


def failing_once(llm, monkeypatch, number, error):
    """Make pass `number` from now on fail; returns the set that will hold the request ids of that pass."""
    runner, count, hit = llm.engine.executor.runner, iter(range(10**6)), set()
    run = runner.start

    def run_or_fail(batch):
        if next(count) == number:
            scheduler = llm.engine.scheduler
            hit.update(scheduler.seats[seat].request_id for seat in scheduler.work(batch).spans.tolist())
            raise error
        return run(batch)

    monkeypatch.setattr(runner, "start", run_or_fail)
    return hit


@pytest.mark.parametrize("kv_fill", ["recompute", "alias"])
@pytest.mark.parametrize("number", [0, 1, 4, 9, 14])
def test_a_pass_that_fails_ends_its_requests_and_no_others(models, expected, monkeypatch, number, kv_fill):
    exits = EarlyExit(layers=[2, 4], thresholds=0.5, kv_fill=kv_fill)
    llm = LLM(models["llama"], early_exit=exits, dtype="float64", max_num_batched_tokens=3, max_num_seqs=3)
    clean = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    assert kv_fill != "recompute" or clean == expected
    hit = failing_once(llm, monkeypatch, number, RuntimeError("out of memory"))
    outputs = llm.generate(PROMPTS, GREEDY)
    assert 0 < len(hit) < len(PROMPTS)
    for output, ids in zip(outputs, clean, strict=True):
        done = output.outputs[0]
        if output.request_id in hit:
            assert (done.finish_reason, done.error) == ("error", "RuntimeError: out of memory")
            assert done.token_ids == ids[: len(done.tokens)]
            assert len(done.tokens) < GREEDY.max_tokens
        else:
            assert (done.finish_reason, done.error) == ("length", None)
            assert done.token_ids == ids
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.pool.in_use == 0
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == clean


def test_a_stream_whose_pass_fails_ends_with_an_error(llm, expected, monkeypatch):
    failing_once(llm, monkeypatch, 3, RuntimeError("out of memory"))
    chunks = list(llm.stream(PROMPTS[0], GREEDY))
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["error"]
    got = [token.id for chunk in chunks for token in chunk.tokens]
    assert got == expected[0][: len(got)]


def test_scoring_whose_pass_fails_says_so(llm, monkeypatch):
    failing_once(llm, monkeypatch, 0, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.score([5, 6, 7])


def test_an_interrupted_call_frees_everything(models, expected, monkeypatch):
    """Ctrl-C lands inside a pass, as a rule: the requests of that pass are freed too."""
    llm = LLM(models["llama"], early_exit=EXITS, dtype="float64", max_model_len=32, kv_cache_tokens=64)
    failing_once(llm, monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert not llm.engine.busy
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.pool.in_use == llm.engine.scheduler.pool.claimed == 0
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == expected


def test_an_aborted_request_leaves_the_others_as_they_are(llm, expected):
    requests = [llm.inputs.requests(ids, GREEDY)[0] for ids in PROMPTS]
    for request in requests:
        llm.engine.add(request)
    for _ in range(3):
        llm.engine.step()
    llm.engine.abort(requests[1].request_id)
    llm.engine.abort("unknown")
    done = run_engine(llm)
    assert requests[1].request_id not in done
    del requests[1]
    assert ids_of(done, requests) == [expected[0], *expected[2:]]
