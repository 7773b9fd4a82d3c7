"""Slices as gcloud and XPK name them: gcloud's own parser where it is installed, the real XPK's own table."""

import importlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llada_jax.chips import CHIPS, parse_topology
from llada_jax.errors import InputError
from tests.helpers.command_lines import run_all
from tests.helpers.xpk_tool import tpu_types, xpk  # noqa: F401

FOLDER = Path(__file__).parents[2] / "experiments" / "launch"
RUN = ["--name=mini", "--project=my-project", "--zone=us-east5-a", "--workdir=gs://b/mini", "--rows=gs://b/rows"]
TRAIN = ["--", "--config=configs/wsd.py:tiny"]


@pytest.fixture(scope="module")
def slices():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("slices")
    sys.path.remove(str(FOLDER))


def every_slice():
    for chip in CHIPS.values():
        yield from (parse_topology(f"{chip.name}:{shape}") for shape in chip.slices)
        if chip.ici_links == 6:
            sides = range(4, chip.largest_slice // 16 + 1, 4)
            for shape in itertools.combinations_with_replacement(sides, 3):
                if shape[0] * shape[1] * shape[2] <= chip.largest_slice:
                    yield parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}")


def test_xpk_types_are_those_of_xpk(slices, xpk, tmp_path):  # noqa: F811
    """A slice is refused where XPK does not know it, and no other."""
    known, seen = tpu_types(xpk, tmp_path), 0
    for topology in every_slice():
        if f"{topology.type_name}-{topology.shape_name}" not in known:
            with pytest.raises(InputError, match=f"--topology={topology.name}: XPK knows"):
                slices.xpk_type(topology)
            continue
        seen += 1
        assert known[slices.xpk_type(topology)] == topology.shape_name
        if topology.is_default:  # as it is with XPK; other sizes are asked for by their shape
            assert known[topology.accelerator_type] == topology.shape_name
    assert seen > 600


# gcloud 528: `gcloud [alpha] compute tpus queued-resources create --help`. Here for machines without gcloud.
TYPES = {"GA": {"v2", "v3", "v4"}, "ALPHA": {"v2", "v3", "v4", "v5litepod", "v5p", "v6e"}}
FLAGS = {
    "project", "zone", "accelerator-type", "type", "topology", "runtime-version", "node-id", "node-count",
    "node-prefix", "spot", "reserved", "scopes", "metadata-from-file",
}  # fmt: skip


def by_the_table(line: str) -> bool:
    words = shlex.split(line)
    track = "ALPHA" if words[1] == "alpha" else "GA"
    assert words[2 if track == "ALPHA" else 1 :][:4] == ["compute", "tpus", "queued-resources", "create"]
    given = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    sized, shaped = "accelerator-type" in given, {"type", "topology"} & given.keys()
    return (
        given.keys() <= FLAGS
        and (sized and not shaped or not sized and len(shaped) == 2 and given["type"] in TYPES[track])
        and ("node-id" in given) != ("node-count" in given)
        and not ("node-prefix" in given and "node-count" not in given)
        and "runtime-version" in given
    )


LAUNCHES = {
    "--accelerator-type=v5p-1024": ["--topology=v5p:8x8x8"],
    "--accelerator-type=v5p-512": ["--topology=v5p:4x8x8", "--slices=3", "--spot"],
    "alpha compute tpus queued-resources create mini": ["--topology=v5p:4x4x16", "--reserved"],
    "--type=v5p --topology=4x8x32": ["--topology=v5p:4x8x32", "--slices=2"],
    "--accelerator-type=v5litepod-4": ["--topology=v5e:2x2"],
    "--accelerator-type=v6e-256": ["--topology=v6e:16x16"],
    "--accelerator-type=v4-1024": ["--topology=v4:8x8x8"],
    "--type=v4 --topology=16x16x16": ["--topology=v4:16x16x16"],
}


@pytest.fixture(scope="module")
def printed():
    """{what is expected: the gcloud commands of its launch, watched}"""
    script = [FOLDER / "launch.py", "tpu_vm", *RUN, "--allow_dirty", "--dry_run", "--action=watch"]
    done = run_all([[*script, *arguments, *TRAIN] for arguments in LAUNCHES.values()])
    assert all(x.returncode == 0 for x in done), done
    lines = [[line.split("   #")[0] for line in x.stdout.splitlines() if line.startswith("gcloud")] for x in done]
    return dict(zip(LAUNCHES, lines, strict=True))


REFUSED = [
    "gcloud compute tpus queued-resources create m --project=my-project --zone=us-east5-a --type=v5p"
    " --topology=8x8x8 --runtime-version=r --node-id=m",
    "gcloud alpha compute tpus queued-resources create m --project=my-project --zone=us-east5-a --type=v5e"
    " --topology=2x2 --runtime-version=r --node-id=m",
    "gcloud compute tpus queued-resources create m --project=my-project --zone=us-east5-a --accelerator-type=v6e-4"
    " --runtime-version=r --node-id=m --node-count=2",
]


@pytest.fixture(scope="module")
def accepted(printed, tmp_path_factory):
    """Whether a command is accepted: by the table and, where there is gcloud, by its linter, which sends nothing."""
    by_gcloud, folder = {}, tmp_path_factory.mktemp("gcloud")
    if shutil.which("gcloud"):
        lines = list(dict.fromkeys([*itertools.chain(*printed.values()), *REFUSED]))
        (folder / "commands.json").write_text(json.dumps([{"command_string": line} for line in lines]))
        command = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'commands.json'}"]
        env = os.environ | {"CLOUDSDK_CONFIG": str(folder)}
        done = subprocess.run(command, env=env, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        by_gcloud = {line: found["success"] for line, found in zip(lines, json.loads(done.stdout), strict=True)}

    def verdict(line):
        found = by_the_table(line) if "queued-resources create" in line else True
        assert not by_gcloud or by_gcloud[line] == found, line
        return found

    return verdict


@pytest.mark.parametrize("expected", LAUNCHES)
def test_gcloud_accepts_what_is_printed(printed, accepted, expected):
    (create,) = (line for line in printed[expected] if "queued-resources create" in line)
    assert expected in create
    assert accepted(create)


def test_gcloud_accepts_the_commands_around_it(printed, accepted):
    lines = [line for line in printed["--accelerator-type=v5p-1024"] if "queued-resources create" not in line]
    assert len(lines) == 6 and all(accepted(line) for line in lines)


@pytest.mark.parametrize("line", REFUSED)
def test_what_gcloud_refuses_the_table_refuses(line, accepted):
    assert not accepted(line)


@pytest.mark.parametrize(
    "name,default", [("v5p:8x8x8", True), ("v5p:4x4x32", False), ("v6e:4x8", True), ("v5p:4x4x20", True)]
)
def test_shapes_that_a_size_stands_for(slices, name, default):
    topology = parse_topology(name)
    assert topology.is_default == default
    assert ("alpha" in slices.create_command(topology)) != default
