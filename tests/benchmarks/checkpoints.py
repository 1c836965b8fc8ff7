"""How long a training stands still for a checkpoint of sharded weights: waiting for it, or not.

    python tests/benchmarks/checkpoints.py       # about three minutes on two CPU cores

Two processes train all weights of a small Llama, sharded by FSDP2, on a sequence each, with AdamW.
After every SPACING steps there is a checkpoint, by turns in three ways: as torch's own writer saves
it while the training waits (with the sync and the hash of its files); by CheckpointWriter, waited
for; and by CheckpointWriter as in a training. "Stands still" is the time between two steps;
"steps beside it" are those in which the files were written. Writes results/checkpoints.{json,md}.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import write_results
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from tbpo_cli.model.sharding import Shards, shard
from tbpo_cli.runs.files import sha256, sync
from tbpo_cli.train.checkpoint import TrainState
from tbpo_cli.train.checkpoint_writer import CheckpointWriter
from tbpo_cli.train.group import Group, side_channel
from tbpo_cli.train.optim import make_moments

WAYS = ("torch's writer, waited for", "CheckpointWriter, waited for", "CheckpointWriter")
SPACING = 8
TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="checkpoints", help="of the files under results/")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints of each way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder, arguments.repeats, arguments.name), nprocs=2)


def train(rank: int, folder: str, repeats: int, name: str) -> None:
    """One of the two processes; the first one writes the table."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = Group(rank, 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, **shape, **heads))
    num_weights = sum(weight.numel() for weight in model.parameters())
    shard(model, Shards(init_device_mesh("cpu", (2,)), trains=True))
    parameters = dict(model.named_parameters())
    state = TrainState(parameters, torch.optim.AdamW(parameters.values(), lr=1e-5))
    make_moments(state.optimizer)
    ids = torch.randint(0, 2000, (1, TOKENS))
    writer = CheckpointWriter(Path(folder) / "checkpoints", {"policy": state}, group)
    stills: dict[str, list[float]] = {way: [] for way in WAYS}
    beside: list[float] = []
    alone: list[float] = []
    last: Path | None = None
    for number in range(1, len(WAYS) * repeats + 1):
        way = WAYS[number % len(WAYS)]
        for _ in range(SPACING):
            begin = time.monotonic()
            is_written = last is None or last.exists()
            writer.advance()
            model(input_ids=ids, labels=ids).loss.backward()
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            group.gather(None)
            (alone if is_written else beside).append(time.monotonic() - begin)
        begin = time.monotonic()
        if way == WAYS[0]:
            save_and_wait(Path(folder) / "torch", state, group)
        else:
            writer.begin(number)
            last = Path(folder) / f"checkpoints/step-{number}"
        if way == WAYS[1]:
            writer.finish()
        stills[way].append(time.monotonic() - begin)
    writer.finish()
    writer.close()
    if group.is_main:
        report(num_weights, stills, alone, beside, name)
    dist.destroy_process_group()


def save_and_wait(folder: Path, state: TrainState, group: Group) -> None:
    """What a training did before it wrote in a thread."""
    if group.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    group.gather(None)
    storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(state.tensors, storage_writer=storage, process_group=side_channel())
    for path in folder.glob(f"shard-{group.rank + 1:05d}-*"):
        sync(path)
        sha256(path)
    group.gather(None)


def report(
    num_weights: int,
    stills: dict[str, list[float]],
    alone: list[float],
    beside: list[float],
    name: str,
) -> None:
    size = 12 * num_weights / 1e6
    lines = ["| checkpoint | stands still, s: median | longest |", "|---|---|---|"]
    rows = []
    for way, seconds in stills.items():
        lines.append(f"| {way} | {median(seconds):.3f} | {max(seconds):.3f} |")
        rows.append({"way": way, "seconds": [round(each, 4) for each in seconds]})
    said = f"{num_weights:,} weights, with two moments {size:.0f} MB, in two processes."
    steps = (
        f"A step takes {median(alone):.2f} s (median of {len(alone)}), beside the writing of a "
        f"checkpoint {median(beside):.2f} s ({len(beside)})."
    )
    rows.append({"alone": [round(x, 4) for x in alone], "beside": [round(x, 4) for x in beside]})
    table = "\n".join([said, "", *lines, "", steps])
    print(table)
    write_results(name, "How long a training stands still for a checkpoint", rows, table)


if __name__ == "__main__":
    main()
