# ruff: noqa: E501, PLC0415
"""A stand-in for NVIDIA's `trtexec`, for tests: it takes and refuses the flags that each version takes and refuses, and answers in
the formats of samples/common/sampleReporting.cpp (NVIDIA/TensorRT). It computes outputs with ONNX Runtime and invents times.

What the real program is known to do and this one does too:
- every run begins with the banner `&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # ...`, whatever the arguments (trtexec.cpp);
- an unknown option ends it with `[E] Unknown option: --x` and exit code 1;
- 8.x refuses float16 tensors unless --fp16 is given; 10.x takes --stronglyTyped, and not together with --fp16; 11.x has no --fp16;
- 8.x documents operator sets up to 17, 10.x up to 20 or 24, 11.x up to 24 (onnx-tensorrt, docs/operators.md), and 8.x takes the axes
  of a reduction from its attribute, but for ReduceSum. The real parsers go on with what they do not know; this one refuses it;
- an engine of another version is refused when it is loaded;
- 8.6 writes the warm-up runs into --exportTimes; JSON is joined from strings, so that a quote in a name breaks it;
- the verbose builder says how many layers could use sparse kernels and how many do.

Its own invention: with `--sparsity=enable` it uses sparse kernels for weights that hold the 2:4 pattern and read at least 64
channels (SPARSE_FROM), and these take SPARSE of the arithmetic's time. Narrower ones are found, not chosen, and take no less.

    install(folder, (10, 3, 0))      # writes folder/trtexec
"""

import hashlib
import itertools
import json
import random
import re
import stat
import sys
from pathlib import Path

MAGIC = b"STAND-IN ENGINE\n"
GPU = "Orin (stand-in)"
COMMON = (
    *("--onnx", "--saveEngine", "--loadEngine", "--sparsity", "--profilingVerbosity", "--timingCacheFile", "--verbose"),
    *(
        "--iterations",
        "--warmUp",
        "--duration",
        "--avgRuns",
        "--percentile",
        "--exportTimes",
        "--exportProfile",
        "--dumpProfile",
    ),
    *("--exportLayerInfo", "--dumpLayerInfo", "--memPoolSize", "--loadInputs", "--exportOutput", "--useSpinWait"),
    *("--noDataTransfers", "--useCudaGraph", "--separateProfileRun", "--help"),
)
KNOWN = {
    8: (*COMMON, "--fp16", "--int8", "--best", "--buildOnly", "--skipInference"),
    10: (*COMMON, "--fp16", "--int8", "--best", "--stronglyTyped", "--skipInference"),
    11: (*COMMON, "--stronglyTyped", "--skipInference", "--noSpinWait", "--includeDataTransfers", "--noCudaGraph"),
}
OPSETS = {8: 17, 10: 20, 11: 24}
CAPABILITIES = {"Xavier": "7.2"}  # of all others: that of Orin
SPARSE_FROM, SPARSE = 64, 0.6
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POINTWISE = ("Relu", "Clip", "Add", "Mul", "Sigmoid", "HardSigmoid", "HardSwish", "Neg")


def install(folder: Path, version: tuple[int, int, int], gpu: str = GPU) -> Path:
    """Write an executable `trtexec` of this version into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "trtexec"
    here = str(Path(__file__).parent)
    code = f"import sys\nsys.path.insert(0, {here!r})\nimport trtexec_standin as t\nsys.exit(t.main(sys.argv, {version!r}, {gpu!r}))\n"
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def load_libraries():
    """Late, so that what needs no model is quick: `--help`, and timing an engine."""
    global np, onnx, TensorProto, numpy_helper, shape_inference  # noqa: PLW0603
    if "onnx" in globals():
        return
    import numpy as np
    import onnx
    from onnx import TensorProto, numpy_helper, shape_inference


def number(version):
    major, minor, patch = version
    return major * 10000 + minor * 100 + patch if major >= 10 else major * 1000 + minor * 100 + patch


def say(text, level="I"):
    print(f"[11/24/2026-12:00:00] [{level}] {text}")


class Refused(Exception):
    """The program ends with an error."""


def main(argv, version, gpu=GPU):
    words = f"TensorRT.trtexec [TensorRT v{number(version)}] # {' '.join(argv)}"
    print(f"&&&& RUNNING {words}")
    try:
        options = parsed(argv[1:], version)
        if "--help" not in options:
            work(options, version, gpu)
    except Refused as error:
        say(str(error), "E")
        print(f"&&&& FAILED {words}")
        return 1
    print(f"&&&& PASSED {words}")
    return 0


def parsed(arguments, version):
    options = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if (
            name not in KNOWN[version[0]]
            or (name == "--buildOnly" and version >= (8, 7))
            or (name == "--skipInference" and version < (8, 6))
        ):
            raise Refused(f"Unknown option: {argument}")
        options[name] = value
    if "--stronglyTyped" in options and "--fp16" in options:
        raise Refused("Invalid usage, setting fp16 precision is not allowed if graph is strongly typed.")
    if ("--onnx" in options) == ("--loadEngine" in options):
        if "--help" in options:
            return options
        raise Refused("Model missing or multiple models given")
    return options


def work(options, version, gpu):
    say("=== Device Information ===")
    say(f"Selected Device: {gpu}")
    say(f"Compute Capability: {CAPABILITIES.get(gpu, '8.7')}")
    say(f"TensorRT version: {'.'.join(map(str, version))}")
    engine = built(options, version, gpu) if "--onnx" in options else loaded(options["--loadEngine"], version)
    if "--saveEngine" in options:
        Path(options["--saveEngine"]).write_bytes(engine)
    if "--skipInference" in options or "--buildOnly" in options:
        return
    infer(options, version, engine)


# --- building


def built(options, version, gpu):
    load_libraries()
    path = Path(options["--onnx"])
    if not path.is_file():
        raise Refused(f"Could not open file {path}")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
        model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:
        raise Refused(f"[TRT] ModelImporter.cpp:771: While parsing {path}: {str(error).splitlines()[0]}") from error
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":
            raise Refused(f"[TRT] {node.name}: weights are not an initializer")
    refuse_newer(model, version)
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    if version < (10,) and half and "--fp16" not in options:
        raise Refused("[TRT] 4: [network.cpp::validate::3062] Error Code 4: Internal Error (fp16 precision has been set for a layer "
                      "or layer output, but fp16 is not configured in the builder)")  # fmt: skip
    if "--timingCacheFile" in options:
        cache = Path(options["--timingCacheFile"])
        if cache.is_file():
            say(f"Loaded {cache.stat().st_size} bytes of timing cache from {cache}")
        cache.write_bytes((cache.read_bytes() if cache.is_file() else b"") + b".")
    if options.get("--sparsity") == "enable" and "--verbose" in options:
        found = [(node, weight) for node, weight in weights(model) if holds_pattern(node, weight)]
        chosen = [node for node, weight in found if reads(node, weight) >= SPARSE_FROM]  # small layers do not gain
        say("[TRT] (Sparsity) Found 0 layer(s) eligible to use sparse tactics", "V")  # an earlier pass
        say(f"[TRT] (Sparsity) Found {len(found)} layer(s) eligible to use sparse tactics", "V")
        say(f"[TRT] (Sparsity) Chose {len(chosen)} layer(s) using sparse tactics", "V")
    detailed, sparse = options.get("--profilingVerbosity") == "detailed", options.get("--sparsity") == "enable"
    quick = {node.output[0] for node, w in weights(model) if reads(node, w) >= SPARSE_FROM and holds_pattern(node, w)}
    rows = [
        (name, [node.name for node in nodes], microseconds(model, nodes, quick if sparse else ()))
        for name, nodes in fused(model)
    ]
    head = f"{number(version)}\n{gpu}\n{int(detailed)}\n{json.dumps(rows)}\n".encode()
    return MAGIC + head + model.SerializeToString()


def refuse_newer(model, version):
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    if opset > OPSETS[version[0]]:
        raise Refused(f"[TRT] operator set {opset}: this version supports operators up to Opset {OPSETS[version[0]]}")
    for node in model.graph.node:
        if version < (10,) and node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
            raise Refused(f"[TRT] {node.name}: axes are an input")


def loaded(path, version):
    engine = Path(path).read_bytes() if Path(path).is_file() else b""
    if not engine.startswith(MAGIC):
        raise Refused(f"Error opening engine file: {path}")
    if engine.split(b"\n")[1] != str(number(version)).encode():
        raise Refused(
            "[TRT] 1: [stdArchiveReader.cpp::StdArchiveReader::32] Error Code 1: Serialization (Version tag does not match)"
        )
    return engine


def model_of(engine):
    load_libraries()
    return onnx.load_from_string(engine.split(b"\n", 5)[5])


def weights(model):
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in LAYERS and node.input[1] in constants:
            yield node, numpy_helper.to_array(constants[node.input[1]])


def inputs_axis(node):
    flipped = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    )
    return 0 if flipped else 1


def reads(node, weight):
    return weight.shape[inputs_axis(node)]


def holds_pattern(node, weight):
    """Every group of four along the inputs has two zeros: told four by four, unlike the library does it."""
    rows = np.moveaxis(weight, inputs_axis(node), -1).reshape(-1, reads(node, weight))
    if rows.shape[1] % 4:
        return False
    zeros = sum((rows[:, i::4] == 0).astype(int) for i in range(4))
    return bool((zeros >= 2).all())


# --- running


def fused(model):
    """Layers of the engine: [name, nodes]; activations and sums join what computes their input, as in TensorRT."""
    readers = {}
    for node in model.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    layers, owner = [], {}
    for node in model.graph.node:
        if node.op_type in ("Reshape", "Flatten", "Constant", "Identity"):
            continue
        before = [owner[t] for t in node.input if t in owner and len(readers[t]) == 1]
        if node.op_type in POINTWISE and before:
            layer = before[-1]
        else:
            layer = []
            layers.append(layer)
        layer.append(node)
        for tensor in node.output:
            owner[tensor] = layer
    named = []
    for nodes in layers:
        if nodes[0].op_type == "Cast":
            name = f"Reformatting CopyNode for Input Tensor 0 to {nodes[0].name}"
        elif nodes[0].op_type in POINTWISE:
            name = f"PWN({', '.join(node.name for node in nodes)})"
        else:
            name = " + ".join(node.name for node in nodes)
        named.append((name, nodes))
    return named


def microseconds(model, nodes, sparse):
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*model.graph.value_info, *model.graph.output]
    }
    constants = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    us = 2.0
    for node in nodes:
        if node.op_type in LAYERS:
            positions = np.prod(shapes[node.output[0]][2:], dtype=float) if node.op_type == "Conv" else 1
            k, c, *rest = constants[node.input[1]]
            work = positions * np.prod(rest, dtype=float) * (8 * -(-k // 8)) * (8 * -(-c // 8)) / 4e5
            us += work * (SPARSE if node.output[0] in sparse else 1)
    return us


def infer(options, version, engine):
    runs, warm = int(options.get("--iterations", 10)), int(options.get("--warmUp", 200)) // 50
    layers = json.loads(engine.split(b"\n", 5)[4])
    noise = random.Random(hashlib.sha256(engine + repr(sorted(options)).encode()).digest())
    if "--exportTimes" in options:
        quiet = version >= (11,) or {"--useSpinWait", "--noDataTransfers", "--useCudaGraph"} <= set(options)
        whole = sum(us for _, _, us in layers) + (0 if quiet else 30)
        times = [whole * (1 + 0.01 * noise.random()) / 1000 for _ in range(runs)]
        export_times(options["--exportTimes"], ([9.9] * warm if version < (10,) else []) + times)
    if "--exportProfile" in options:
        if version < (11,) and "--separateProfileRun" not in options:
            raise Refused("the stand-in knows profiles from separate runs only")
        slower = [(name, 1.2 * us + 1, nodes) for name, nodes, us in layers]
        export_profile(options["--exportProfile"], runs, slower)
    if "--exportLayerInfo" in options:
        export_layers(options["--exportLayerInfo"], layers, engine.split(b"\n", 4)[3] == b"1")
    if "--exportOutput" in options:
        if version >= (11,) and "--includeDataTransfers" not in options:
            raise Refused("outputs stay on the device: --includeDataTransfers is missing")
        export_outputs(options["--exportOutput"], compute(model_of(engine), options["--loadInputs"]))
    say("=== Performance summary ===")


def export_times(path, times):
    text, sep = "[\n", "  "
    for ms in times:
        text += (
            f'{sep}{{ "startEnqMs" : 0.0, "endEnqMs" : 0.01, "startH2dMs" : 0.0, "endH2dMs" : 0.0, "startComputeMs" : 0.0, '
            f'"endComputeMs" : {ms:.6g}, "startD2hMs" : 0.0, "endD2hMs" : 0.0, "h2dMs" : 0, "computeMs" : {ms:.6g}, "d2hMs" : 0, '
            f'"latencyMs" : {ms:.6g} }}\n'
        )
        sep = ", "
    Path(path).write_text(text + "]\n")


def export_profile(path, runs, layers):
    total = sum(us for _, us, _ in layers)
    text = f'[\n  {{ "count" : {runs} }}\n'
    for name, us, _ in layers:
        ms = us / 1000
        text += (
            f', {{ "name" : "{name}", "timeMs" : {runs * ms:.6g}, "averageMs" : {ms:.6g}, "medianMs" : {ms:.6g}, '
            f'"percentage" : {100 * us / total:.6g} }}\n'
        )
    Path(path).write_text(text + "]\n")


def export_layers(path, layers, detailed):
    if detailed:
        rows = [
            "{\n" + f'  "Name": "{name}",\n  "LayerType": "stand-in",\n  "Inputs": [],\n  "Outputs": [],\n  "Metadata": "'
            + "\\u001e".join(f"[ONNX Layer: {node}]" for node in nodes) + '"\n}'
            for name, nodes, _ in layers
        ]  # fmt: skip
    else:
        rows = [f'"{name}"' for name, *_ in layers]
    Path(path).write_text('{"Layers": [' + ",".join(rows) + '],\n"Bindings": []\n}\n')


def compute(model, given):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    files = dict(re.match(r"'?([^:']+)'?:(.+)", part).groups() for part in given.split(","))
    feed = {}
    for value in session.get_inputs():
        feed[value.name] = np.fromfile(files[value.name], np.float32).reshape(value.shape)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def export_outputs(path, found):
    text, seps = "[\n", itertools.chain(["  "], itertools.repeat(", "))
    for name, value in found.items():
        values = ", ".join(f"{x:.9g}" for x in value.astype(np.float64).ravel())
        shape = "x".join(map(str, value.shape))
        text += f'{next(seps)}{{ "name" : "{name}"\n  , "dimensions" : "{shape}"\n  , "values" : [ {values} ]\n  }}\n'
    Path(path).write_text(text + "]\n")
