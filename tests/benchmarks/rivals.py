"""The competitors of `versus`, each in a process of its own: `PYTHON rivals.py NAME FOLDER`.

Runs in environments without mpichunk, so it imports nothing of this repository but where `mpichunk`
is what is measured. One line on stdin, a JSON object, is one run; one line on stdout answers it.
"""

import importlib.util
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

MODEL_PY = """
import importlib.util
spec = importlib.util.spec_from_file_location("em_net", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
InstantiatedModel = module.EmAffinityResUNet().eval()
"""
"""A model file of chunkflow."""


class Counted(torch.nn.Module):
    """The network, which counts its forwards."""

    def __init__(self, settings):
        super().__init__()
        spec = importlib.util.spec_from_file_location("em_net", settings["net"])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.net = module.EmAffinityResUNet().eval()
        self.net.load_state_dict(torch.load(settings["weights"], weights_only=True))
        self.num_calls = 0
        self.out_channels = 3

    def forward(self, batch):
        self.num_calls += 1
        return self.net(batch)


def bare(folder, settings):
    """Eager forwards of the patches of the volume, which are there already, and nothing else."""
    net, image = Counted(settings), np.load(folder / "image.npy")
    patches = []
    for start in settings["starts"]:
        box = tuple(slice(a, a + n) for a, n in zip(start, settings["patch"], strict=True))
        patches.append(torch.from_numpy(image[box][None, None].astype(np.float32) / 255))

    def run(_):
        with torch.inference_mode():
            for patch in patches:
                net(patch)

    return run, net, version("torch")


def monai(folder, settings):
    """`sliding_window_inference`, given the same window."""
    from monai.inferers import sliding_window_inference

    net, image = Counted(settings), np.load(folder / "image.npy")
    window = torch.from_numpy(np.load(folder / "window.npy"))
    # It rounds the stride down: half a voxel less makes it the one that is meant.
    pairs = zip(settings["overlap"], settings["patch"], strict=True)
    overlap = [max(0.0, o - 0.5) / n for o, n in pairs]

    def run(_):
        with torch.inference_mode():
            volume = torch.from_numpy(image.astype(np.float32) / 255)[None, None]
            found = sliding_window_inference(
                volume, settings["patch"], 1, net, overlap=overlap, roi_weight_map=window
            )
        return found[0].numpy()

    return run, net, version("monai")


def torch_em(folder, settings):
    """`predict_with_halo_pipelined`: half the overlap is the halo, and is cropped."""
    from torch_em.util.prediction import predict_with_halo_pipelined

    net, image = Counted(settings), np.load(folder / "image.npy")
    halo = [o // 2 for o in settings["overlap"]]
    block = [n - 2 * h for n, h in zip(settings["patch"], halo, strict=True)]

    def run(_):
        return predict_with_halo_pipelined(
            image,
            net,
            ["cpu"],
            block,
            halo,
            preprocess=lambda raw: raw.astype(np.float32) / 255,
            disable_tqdm=True,
        )

    return run, net, version("torch-em")


def chunkflow(folder, settings):
    """The Inferencer with a model file, as `chunkflow inference --framework pytorch`."""
    from chunkflow.chunk import Chunk
    from chunkflow.flow.divid_conquer.inferencer import Inferencer

    model = folder / "model.py"
    model.write_text(MODEL_PY.format(path=settings["net"]))
    inferencer = Inferencer(
        str(model),
        settings["weights"],
        tuple(settings["patch"]),
        num_output_channels=3,
        output_patch_overlap=tuple(settings["overlap"]),
        framework="pytorch",
        dtype="float32",
    )
    net = Counted(settings)
    net.net = inferencer.patch_inferencer.model
    inferencer.patch_inferencer.model = net

    images = {name: np.load(folder / f"{name}.npy") for name in ("image", "aligned")}

    def run(command):
        return np.asarray(inferencer(Chunk(images[command.get("image", "image")])).array)

    return run, net, version("chunkflow")


def mpichunk(variant):
    """Whole runs, from the config to the end of the journal: input and output are zarr 3."""

    def prepare(folder, settings):
        from mpichunk.processmemory import settle_allocator
        from mpichunk.ranks.comm import SerialCommunicator
        from mpichunk.rundir.history import History
        from mpichunk.verbs.run import run_on

        # As the `run` verb does.
        settle_allocator()

        def run(command):
            where = folder / f"{variant}-{command['config']}"
            shutil.rmtree(where, ignore_errors=True)
            sets = [
                *settings["models"][variant],
                f"output.volume={where / 'out.zarr'}",
                f"run_dir={where / 'run'}",
            ]
            config = folder / f"{command['config']}.yaml"
            assert run_on(SerialCommunicator(), config, sets) == 0
            events = History()
            events.follow(where / "run" / "journal.jsonl")
            command["blocks_seconds"] = events.end["time"] - events.starts[-1]["time"]
            if command.get("save"):
                from mpichunk.volume import open_input

                with open_input(str(where / "out.zarr")) as reader:
                    return np.asarray(reader.read(reader.info.domain).result())
            return None

        return run, None, version(settings["packages"][variant])

    return prepare


RIVALS = {
    "bare": bare,
    "monai": monai,
    "torch-em": torch_em,
    "chunkflow": chunkflow,
    "mpichunk-pytorch": mpichunk("pytorch"),
    "mpichunk-openvino": mpichunk("openvino"),
    "mpichunk-openvino-avx2": mpichunk("openvino-avx2"),
}


def main(name, folder):
    """Answer what is asked on stdin until it ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    run, net, number = RIVALS[name](folder, settings)
    print(json.dumps({"version": number}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        before = net.num_calls if net is not None else 0
        started = time.perf_counter()
        output_czyx = run(command)
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "blocks_seconds": command.get("blocks_seconds", seconds)}
        if net is not None:
            answer["num_patches"] = net.num_calls - before
        if command.get("save") and output_czyx is not None:
            np.save(command["save"], output_czyx)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
