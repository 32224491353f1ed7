"""TensorRT for people: the exact commands to type on a device, and what its builder said about 2:4 sparsity, in a sentence."""

from collections.abc import Mapping
from typing import Any

from deploypipe.backends import trt_flags

_GENERATIONS = {
    "TensorRT 8.4 and 8.5 (JetPack 5)": (8, 5, 2),
    "TensorRT 8.6 (JetPack 6.0)": (8, 6, 2),
    "TensorRT 10 (JetPack 6.1 and later)": (10, 3, 0),
    "TensorRT 11": (11, 1, 0),
}
_WARMUP_MS = 500


def by_hand(models: Mapping[str, str], precision: str, runs: int) -> str:
    """Return in Markdown what to type for each model (name -> ONNX file), by generation of trtexec."""
    parts = []
    for title, version in _GENERATIONS.items():
        lines = []
        for name, file in models.items():
            plan = f"{name}.plan"
            build = trt_flags.build(version, file, plan, precision, sparse=True, cache="timing.cache")
            measure = trt_flags.measure(version, plan, runs, _WARMUP_MS, f"{name}-times.json")
            profile = trt_flags.profile(version, plan, runs, _WARMUP_MS, f"{name}-profile.json", f"{name}-layers.json")
            lines += [f"trtexec {' '.join(arguments)}" for arguments in (build, measure, profile)]
        parts.append(f"{title}:\n\n```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)


def sparsity_verdict(built: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what became of weights that hold the 2:4 pattern; nothing if none do, or if the builder did not tell."""
    found, chose = built.get("sparse_found", 0), built.get("sparse_chose", 0)
    if not found:
        return ()
    evidence = f"TensorRT found {found} layer{'s' * (found != 1)} that could use sparse kernels and chose them for {chose}"
    return (f"{evidence}: 2:4 gave nothing here" if not chose else evidence,)
