"""Checkpoints on disk: what can be read, what is refused in words, and that a grown one appears whole or not at all."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from growkit import LiGO  # noqa: E402
from growkit.growth import recipe as growth  # noqa: E402
from growkit.growth.checkpoint import open_checkpoint  # noqa: E402
from growkit.growth.recipe import Recipe  # noqa: E402

from growth.forks import fork  # noqa: E402  isort: skip
from growth.models import CONFIGS, model  # noqa: E402  isort: skip

SIZES = {"layers": 4, "hidden_size": 40, "heads": 5}


@pytest.fixture(scope="module")
def small():
    made = model(CONFIGS["gpt2"](24, 3, 2, 50), torch.float32)
    made.generation_config.eos_token_id = [7, 9]
    return made


@pytest.fixture
def folder(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "small/tokenizer.json").write_text("{}")
    return tmp_path / "small"


def grow(folder, out, sizes=SIZES, force=False, **options):
    return growth.run(growth.plan(Recipe(str(folder), sizes, **options)), out, force=force, shard_bytes=20_000)


def test_grown_checkpoint(folder, small, tmp_path):
    out = tmp_path / "runs/big"
    measured = grow(folder, out)
    assert measured["relative_output_change"] < 1e-5
    big, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(61, (2, 8))
    assert (big(tokens).logits - small(tokens).logits).abs().max() < 1e-4
    assert big.generation_config.eos_token_id == [7, 9] and (out / "tokenizer.json").read_text() == "{}"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: small\n") and f"{measured['relative_output_change']:.2g}" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "small"]
    assert [path.name for path in out.parent.iterdir()] == ["big"]


def test_recipe_makes_the_same_weights_again(folder, tmp_path):
    grow(folder, tmp_path / "first", start="hypercloning", sizes={"layers": 3, "hidden_size": 48, "heads": 6})
    again = Recipe.load(tmp_path / "first/growkit_recipe.yaml")
    growth.run(growth.plan(again), tmp_path / "second", shard_bytes=20_000)
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


class Tempered(transformers.GPT2LMHeadModel):
    """Logits by a buffer that is saved; one per layer beside it, and one whose size follows from the config."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("temperature", torch.ones(()))
        for block in self.transformer.h:
            block.register_buffer("steps", torch.zeros(1, dtype=torch.int32))
        if config.resid_pdrop:
            self.register_buffer("mean", torch.zeros(config.n_embd))

    def forward(self, *inputs, **named):
        output = super().forward(*inputs, **named)
        output.logits = output.logits * self.temperature
        return output


@pytest.fixture
def tempered(tmp_path, monkeypatch):
    for package in (transformers, sys.modules["transformers"]):  # it puts another in its place while it is imported
        monkeypatch.setattr(package, "Tempered", Tempered, raising=False)

    def save(**options):
        made = model(CONFIGS["gpt2"](24, 3, 2, 50, **options), torch.float32, "Tempered")
        with torch.no_grad():
            made.temperature.fill_(3.0)
            for number, block in enumerate(made.transformer.h):
                block.steps.fill_(number + 5)
        made.save_pretrained(tmp_path / "small")
        return tmp_path / "small"

    return save


def test_saved_buffers_are_in_the_file(tempered, tmp_path):
    folder = tempered(resid_pdrop=0.0)
    assert grow(folder, tmp_path / "big")["relative_output_change"] < 1e-5
    held = open_checkpoint(tmp_path / "big").weights
    assert held["temperature"] == 3 and [int(held[f"transformer.h.{i}.steps"]) for i in range(4)] == [5, 5, 6, 6]
    operator = LiGO(open_checkpoint(folder).model(), {"n_layer": 4, "n_embd": 40, "n_head": 5})
    assert operator.grow().temperature == 3 and operator.small_model().transformer.h[1].steps == 6


def test_saved_buffers_of_another_size_are_refused_by_name(tempered, tmp_path):
    folder = tempered(resid_pdrop=0.1)
    with pytest.raises(ValueError, match="Tempered saves buffers that .* cannot be grown from weights alone: mean"):
        grow(folder, tmp_path / "big")
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("form", ("sharded", "bin", "sharded bin", "older names"))
def test_every_form_of_file_is_read(form, small, tmp_path):
    folder = tmp_path / "small"
    small.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "5GB")
    weights = dict(small.state_dict())
    if form == "older names":  # of files saved without the head's prefix
        weights = {name.removeprefix("transformer."): value for name, value in weights.items() if "lm_head" not in name}
        safetensors.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif "bin" in form:
        (folder / "model.safetensors").unlink()
        names = list(weights)
        parts = {"pytorch_model.bin": names}
        if form == "sharded bin":
            parts = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
            weight_map = {name: file for file, held in parts.items() for name in held}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, held in parts.items():
            torch.save({name: weights[name] for name in held}, folder / file)
    opened = open_checkpoint(folder)
    assert opened.weights.keys() == dict(small.named_parameters()).keys()
    for name, value in small.named_parameters():
        assert torch.equal(opened.weights[name], value), name


def _index(folder, file):
    weights = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, file)}))


def _change(**changes):
    def change(folder):
        weights = safetensors.load_file(folder / "model.safetensors")
        for name, value in changes.items():
            name = name.replace("__", ".")
            weights[name] = value(weights[name]) if name in weights else value(None)
        kept = {name: value for name, value in weights.items() if value is not None}
        safetensors.save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return change


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))

    return change


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def _evil(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": _Evil()}))


BROKEN = {
    "no folder": (shutil.rmtree, "expected a local folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "cut off": (_cut, "model.safetensors"),
    "outside": (lambda folder: _index(folder, "../small/model.safetensors"), "files in the same folder"),
    "absent shard": (lambda folder: _index(folder, "other.safetensors"), "is not there"),
    "NaN": (_change(transformer__wpe__weight=lambda w: w * float("nan")), "transformer.wpe.weight has"),
    "shape": (_change(transformer__wpe__weight=lambda w: w[:5].contiguous()), "transformer.wpe.weight"),
    "missing": (_change(transformer__h__1__ln_1__bias=lambda w: None), "transformer.h.1.ln_1.bias"),
    "unknown": (_change(transformer__adapter=lambda w: torch.ones(3)), "transformer.adapter"),
    "dtypes": (_change(transformer__wpe__weight=lambda w: w.half()), "float16"),
    "pickle": (_evil, "pytorch_model.bin"),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), "quantized"),
    "class": (_config(architectures=["MyOwn"]), "'MyOwn'"),
    "family": (_config(model_type="xlnet", architectures=["XLNetLMHeadModel"]), "xlnet|XLNet|small"),
}


@pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint_is_refused_and_nothing_written(change, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change(folder)
    before = {path: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}
    with pytest.raises(ValueError, match=words):
        grow(folder, tmp_path / "big")
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"small"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": {"layers": 1}}, "n_layer: got 1, expected at least 2"),
        ({"sizes": {"kv_heads": 3}}, "--kv-heads: gpt2 has no such size, expected .*heads"),
        ({"sizes": {}}, "expected sizes such as"),
        ({"learn": 3}, "expected --data"),
        ({"sizes": {}, "params": "many"}, "'many', expected a number of parameters"),
        ({"sizes": {}, "params": "1k"}, "expected more than"),
    ],
)
def test_requests_that_cannot_be(options, words, folder, tmp_path):
    with pytest.raises(ValueError, match=words):
        grow(folder, tmp_path / "big", **{"sizes": SIZES} | options)
    assert not (tmp_path / "big").exists()


def test_params_propose_sizes(folder, tmp_path):
    plan = growth.plan(Recipe(str(folder), params="60k"))
    assert abs(plan.parameters[1] - 60_000) < 6000 and plan.operator.config.n_embd // plan.operator.config.n_head == 8


def test_existing_folder_stays_without_force(folder, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="--force"):
        grow(folder, tmp_path / "big")
    assert (tmp_path / "big/thesis.txt").read_text() == "years of work"
    grow(folder, tmp_path / "big", force=True)
    assert not (tmp_path / "big/thesis.txt").exists() and (tmp_path / "big/config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "small"]


def test_full_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OSError, match="GB free"):
        grow(folder, tmp_path / "big")
    assert not (tmp_path / "big").exists()


def _child(work):
    """Run in a fork, which starts with everything imported; its process id."""
    pid = fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_nothing_half_written_has_the_name(folder, tmp_path):
    plan = growth.plan(Recipe(str(folder), SIZES))
    out = tmp_path / "big"

    def work():
        growth.run(plan, out, check=False, shard_bytes=20_000)

    started = time.perf_counter()
    os.waitpid(_child(work), 0)
    whole, taken = sorted(path.name for path in out.iterdir()), time.perf_counter() - started
    draw, finished = random.Random(0), 0
    for kill in range(50):
        shutil.rmtree(out, ignore_errors=True)
        pid = _child(work)
        time.sleep(draw.uniform(0, 1.2 * taken))
        os.kill(pid, (signal.SIGKILL, signal.SIGTERM)[kill % 2])
        os.waitpid(pid, 0)
        if out.exists():
            finished += 1
            assert sorted(path.name for path in out.iterdir()) == whole
            open_checkpoint(out)
    assert finished < 50


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("layers", [40, pytest.param(280, marks=pytest.mark.slow)], ids=["0.5 GB", "3.5 GB"])
def test_memory_is_bounded_by_one_module_type(layers, tmp_path):
    small = transformers.GPT2LMHeadModel(CONFIGS["gpt2"](256, 4, 6))
    small.save_pretrained(tmp_path / "small")
    plan = growth.plan(Recipe(str(tmp_path / "small"), {"layers": layers, "hidden_size": 512}))
    assert plan.disk > 4 * plan.memory

    def work():
        with open("/proc/self/status") as status:
            data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + plan.memory, data + plan.memory))
        growth.run(plan, tmp_path / "big", check=False)

    _, status = os.waitpid(_child(work), 0)
    assert status == 0
    assert sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")) > plan.disk


def test_learning_on_text(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(97 + i): i for i in range(26)}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("abcdefgh" * 50)
    options = {"learn": 2, "data": str(tmp_path / "text.txt"), "batch": 2, "context": 8}
    measured = grow(folder, tmp_path / "big", **options)
    assert measured["relative_output_change"] > 1e-6 and measured["loss_before_learning"] > 0
    learned = open_checkpoint(tmp_path / "big").weights
    assert not torch.equal(learned["transformer.wte.weight"], _lossless(folder)["transformer.wte.weight"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_arithmetic_that_is_told_is_about_what_is_counted(family, tmp_path):
    model(CONFIGS[family](32, 4, 2, 48, 2, vocab_size=500), torch.float32).save_pretrained(tmp_path / "small")
    plan = growth.plan(Recipe(str(tmp_path / "small"), {"layers": 5, "hidden_size": 64}))
    assert 0.9 < plan.flops / plan.operator.flops_per_expansion.forward < 2


def _gguf(path, tokens):
    """A LLaMA of one layer as llama.cpp stores it, in float32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1), writer.add_context_length(24), writer.add_embedding_length(32)
    writer.add_feed_forward_length(48), writer.add_head_count(4), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(10000.0), writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(8), writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(tokens), writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(tokens)), writer.add_bos_token_id(0), writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32)}
    shapes |= {"blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32)}
    shapes |= {"blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_grows_with_its_tokenizer_and_learns_by_it(tmp_path):
    pytest.importorskip("accelerate")
    file = tmp_path / "small.gguf"
    _gguf(file, [chr(97 + i) for i in range(26)] + ["ab"])
    (tmp_path / "text.txt").write_text("abcdefgh" * 20)
    sizes = {"layers": 2, "hidden_size": 64, "heads": 8, "kv_heads": 4}
    assert grow(file, tmp_path / "big", sizes)["relative_output_change"] < 1e-4
    own = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "big")
    assert tokenizer("abcab").input_ids == own("abcab").input_ids and len(own("abcab").input_ids) > 1
    options = {"learn": 1, "data": str(tmp_path / "text.txt"), "batch": 1, "context": 8}
    assert grow(file, tmp_path / "learned", sizes, **options)["loss_after_learning"] > 0


def test_learning_without_a_tokenizer_is_refused_in_a_line(folder, tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 50)
    with pytest.raises(ValueError, match="small: no tokenizer that transformers reads: ") as refused:
        grow(folder, tmp_path / "big", learn=1, data=str(tmp_path / "text.txt"))
    assert "\n" not in str(refused.value) and not (tmp_path / "big").exists()


def _lossless(folder):
    checkpoint = open_checkpoint(folder)
    return dict(LiGO(checkpoint.model(), {"n_layer": 4, "n_embd": 40, "n_head": 5, "n_inner": 83}).tensors())
