"""MobileNetV2 as Keras trained it, as a feature network of one's own: `--features mobilenetv2:load --weights FILE.npz`.

The file is TensorFlow Lite's classifier of ImageNet as an .npz: weights with folded batch norms, and the graph as JSON.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.core.checkpoint import file_sha256, read_tensors
from hieratok.core.files import parse_json, shown
from hieratok.evaluation.features import FeatureNetwork


class Graph(nn.Module):
    """Runs the convolutional part of a TensorFlow Lite graph: a list of operations on numbered tensors, up to the
    pooled features. Weights are OIHW, padding is TensorFlow's."""

    def __init__(self, graph: dict[str, Any], tensors: dict[str, Tensor]):
        super().__init__()
        self.input = graph["input"]
        self.ops = graph["ops"]
        self.weights = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.float()) for k, v in tensors.items()})

    def forward(self, x: Tensor) -> Tensor:
        values = {self.input: x}
        for op in self.ops:
            x = values[op["in"][0]]
            match op["op"]:
                case "QUANTIZE":
                    pass
                case "PAD":
                    (top, bottom), (left, right) = op["pad"][1:3]
                    if max(top, bottom, left, right) > 64:
                        raise ValueError("a padding of more than 64 pixels")
                    x = F.pad(x, (left, right, top, bottom))
                case "CONV_2D" | "DEPTHWISE_CONV_2D":
                    x = self._convolve(x, op)
                case "ADD":
                    x = x + values[op["in"][1]]
                case "MEAN":
                    return x.mean((2, 3))
                case other:
                    raise ValueError(f"operation {other} is not supported")
            values[op["out"]] = F.relu6(x) if op.get("act") == 3 else x
        raise ValueError("the graph has no pooled features: no MEAN")

    def _convolve(self, x: Tensor, op: dict[str, Any]) -> Tensor:
        weight, bias = self.weights[f"{op['w']}_weight"], self.weights[f"{op['w']}_bias"]
        if op["pad"] == 0:  # SAME: as many outputs as strides fit, the odd pixel of padding to the right and below
            lacking = [
                max((-(-size // op["stride"]) - 1) * op["stride"] + kernel - size, 0)
                for size, kernel in zip(x.shape[2:], weight.shape[2:])
            ]
            x = F.pad(x, (lacking[1] // 2, (lacking[1] + 1) // 2, lacking[0] // 2, (lacking[0] + 1) // 2))
        groups = x.shape[1] if op["op"] == "DEPTHWISE_CONV_2D" else 1
        return F.conv2d(x, weight, bias, stride=op["stride"], groups=groups)


def load(path: Path) -> FeatureNetwork:
    """Keras's MobileNetV2 1.0, 1280-d, from an .npz with folded batch norms and the graph as JSON (`graph_json`)."""
    tensors = read_tensors(path)
    if "graph_json" not in tensors:
        raise ValueError(f"{path} has no graph_json: MobileNetV2 is read from an .npz that carries its graph")
    graph = parse_json(tensors.pop("graph_json").numpy().tobytes(), f"graph_json of {shown(path)}")
    tensors = {k: v for k, v in tensors.items() if v.ndim in (1, 4)}
    try:
        network = Graph(graph, tensors)
        network(torch.zeros(1, 3, 224, 224))
    except Exception as error:  # whatever running a wrong graph leads to
        raise ValueError(f"{shown(path)}: its graph cannot be run ({type(error).__name__})") from error
    return FeatureNetwork(
        "mobilenetv2",
        network,
        lambda x: F.interpolate(x.float(), (224, 224), mode="bilinear", antialias=True) / 127.5 - 1,
        "antialiased bilinear to 224 px, x / 127.5 - 1",
        file_sha256(path),
    )
