"""Programs as text, which descriptor makes which element, and the bytes that descriptors move."""

import json
import re

import numpy as np
import pytest

import golden.train
from golden import data as data_module
from hw.config import PRESETS
from hw.descriptor import Opcode, encode
from sim import compiler, train
from sim.__main__ import main
from sim.accesses import accesses, traffic
from sim.disassembler import Symbols, element_address, listing, producers, symbols


def compiled(model="tiny-cnn", method="niti", core="tiny", data="digits"):
    network = golden.train.build(method, model, 1, data=data, batch=8)
    return compiler.compile_training(PRESETS[core], network, batch=8, capacity=2, steps=2, rate=5)


@pytest.mark.parametrize("core", ["tiny", "base", "wide"])
@pytest.mark.parametrize("model, data", [("mlp", "digits"), ("tiny-cnn", "digits"), ("lenet", "mnist")])
def test_every_descriptor_is_listed(model, data, core):
    program = compiled(model, core=core, data=data)
    lines = listing(program.program.image, program.program.address, symbols(program))
    heads = [re.fullmatch(r" *(\d+)  0x(\w{8})  (\w+) *(.*)", line) for line in lines]
    heads = [head for head in heads if head]
    blocks = program.program.blocks
    assert [int(head[1]) for head in heads] == list(range(len(blocks)))
    assert [int(head[2], 16) for head in heads] == [program.program.address + 256 * k for k in range(len(blocks))]
    assert [head[3] for head in heads] == [block.opcode.name for block in blocks]
    for head, block in zip(heads, blocks, strict=True):
        if block.opcode not in (Opcode.LOOP, Opcode.END):
            assert head[4].startswith(f"{block.layer} {block.step}".strip())


def test_a_listing_names_what_the_fields_mean():
    program = compiled()
    text = "\n".join(listing(program.program.image, program.program.address, symbols(program, "title")))
    wave = program.regions["conv0.accumulator"].address
    assert text.startswith("; title\n") and f"{wave:#x}" not in text
    for part in ("conv0.accumulator: ", "images + base 1 (images of the step)", "to r", "(maximum of conv0 forward)",
                 "GRADIENT: tiles", "NITI_LOSS over", "10 classes", "2x2 maximum", "to the place of the maximum",
                 "shift r", "pseudo_stochastic", "until 2 training steps are made", "EXPONENT r", "logits.exponent",
                 "dump      all registers to scalars", "waits for everything before it", "raises the interrupt",
                 "zero where source 1 is not above zero", "after ", "folds "):
        assert part in text, part
    bare = "\n".join(listing(program.program.image, 0x100, Symbols()))
    assert f"{wave:#x}: " in bare and "tag 3" in bare and "   0  0x00000100  SCALAR" in bare


def test_symbols_survive_json():
    names = symbols(compiled(), "t")
    assert Symbols.from_json(json.loads(json.dumps(names.to_json()))) == names


@pytest.mark.parametrize("core", ["tiny", "base"])
def test_every_tensor_has_one_producer_per_element(core):
    """Seen from the program: what golden records is made by the pass of that name."""
    program = compiled(core=core)
    passes = {"accumulator": "forward", "error_accumulator": "error", "gradient": "gradient", "weight": "update"}
    random = np.random.default_rng(1)
    for name, tensor in program.tensors.items():
        if tensor.region.name == "images":
            continue
        index = tuple(int(random.integers(size)) for size in tensor.shape)
        assert tensor.region.address <= element_address(tensor, index) < tensor.region.end
        made = [program.program.blocks[number] for number in producers(program, name, index)]
        layer, _, kind = name.partition(".")
        if kind in passes:
            assert [(block.layer, block.step) for block in made] == [(layer, passes[kind])], name
        else:
            assert len(made) == 1 and made[0].opcode is Opcode.VECTOR, name
    for name in program.scalars:
        assert producers(program, name, None), name


@pytest.mark.parametrize("model", ["mlp", "tiny-cnn"])
def test_the_bytes_of_the_descriptors_are_those_on_the_bus(tmp_path, model):
    """Written: exactly. Read: but for the prologue, the LOOP and END descriptors and what was fetched ahead."""
    network = golden.train.build("niti", model, 1, data="digits", batch=8)
    summary = train.train(PRESETS["tiny"], network, data_module.load("digits"), 3, tmp_path, test_images=0,
                          floating=False, log=lambda line: None)
    rows = json.loads((tmp_path / "cycles.json").read_text())
    read, written = (sum(row[key] for row in rows) for key in ("bytes_read", "bytes_written"))
    assert written == summary["bytes_written"]
    line = PRESETS["tiny"].line_bytes
    layers = len(network.description.weight_layers)
    outside = layers * (256 + line) + 256 + 3 * 256 + 256
    assert 0 <= summary["bytes_read"] - read - outside <= 16 * line
    assert all(row["bytes_read"] for row in rows if row["pass"] != "exponents")


def test_disabled_streams_move_nothing():
    """A block that neither loads nor stores, and a vector pass without sources."""
    config = PRESETS["tiny"]
    feed = {"mode": 2, "tiles0": 1, "tiles1": 1, "tiles2": 1, "tiles3": 1, "last": 0}
    assert accesses(config, Opcode.PRODUCT, {"load_a": {"tiles": 4, "runs": 4, "lines": 4}, "feed": feed}) == []
    fill = {"function": 3, "enable": 8, "target0": 64, "target0_stride0": 4, "count0": 9, "count1": 1, "count2": 1,
            "count3": 1, "count4": 1}
    (target,) = accesses(config, Opcode.VECTOR, {"vector": fill})
    assert target.write and target.lines.tolist() == [64, 80, 96]     # nine int8 vectors of 4 in lines of 16 bytes
    assert traffic(config, compiled().program)["", "step done"] == (256, 256)


def test_files_and_folders(tmp_path, capsys):
    program = compiled().program
    path = tmp_path / "p.bin"
    path.write_bytes(program.image)
    assert main(["disassemble", str(path), "--address", "0x4000"]) == 0
    assert capsys.readouterr().out.startswith("   0  0x00004000  SCALAR   tag 0")

    def refused(target, *parts):
        assert main(["disassemble", str(target)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(part in error for part in parts), error

    refused(tmp_path / "none", "cannot read", "No such file")
    refused(tmp_path, "is no folder of a run")
    path.write_bytes(program.image[:-1])
    refused(path, str(path), "are no program: descriptors have 256 bytes")
    path.write_bytes(program.image[:-256])
    refused(path, "has no END")
    path.write_bytes(program.image[:512] + bytes([99]) + program.image[513:])
    refused(path, "descriptor 2 at 0x200: unknown opcode 99")
    vector = encode(Opcode.VECTOR, vector={"function": 9})
    path.write_bytes(vector + program.image)
    refused(path, "descriptor 0 at 0x0: 9 is not a valid Function")
    path.write_bytes(encode(Opcode.VECTOR, vector={"function": 0, "rounding": 15}) + program.image)
    refused(path, "descriptor 0 at 0x0: unknown rounding")
    (tmp_path / "programs.json").write_text("[")
    refused(path, "programs.json is damaged")
