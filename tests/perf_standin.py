"""A stand-in for ONNX Runtime's `onnxruntime_perf_test`, for tests: it times models with this machine's ONNX Runtime, for real.

From the sources of the real one (microsoft/onnxruntime, onnxruntime/test/perftest): command_args_parser.cc has the options, and
refuses others; without -I it looks for test data beside the model; performance_runner.cc runs once before it counts, and
appends `model,seconds,memory,CPU usage,run` a line to the result file, with six digits; main.cc ends every failure with -1.

    install(folder)      # writes folder/onnxruntime_perf_test
"""

import stat
import sys
import time
from pathlib import Path

FLAGS = {"-I": 0, "-e": 1, "-S": 1, "-m": 1, "-r": 1, "-x": 1, "-y": 1, "-o": 1}


def install(folder: Path) -> Path:
    """Write the program."""
    program = folder / "onnxruntime_perf_test"
    program.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def fail(text: str) -> None:
    print(text, file=sys.stderr)
    sys.exit(255)


def parsed(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    left, options, files = list(arguments), {}, []
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            files.append(word)
        elif word not in FLAGS:
            fail(f"ERROR: Unknown command line flag '{word.lstrip('-')}'")
        else:
            options[word] = left.pop(0) if FLAGS[word] else ""
    return options, files


def main(arguments: list[str]) -> None:
    options, (model, results) = parsed(arguments)
    if "-I" not in options:
        fail("there is no test data for model")
    if options.get("-m", "duration") != "times":
        fail("would run for ten minutes")
    import numpy as np  # noqa: PLC0415 - late, so that a refusal is quick
    import onnxruntime as ort  # noqa: PLC0415

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = int(options["-x"]), int(options["-y"])
    settings.log_severity_level = 4
    try:
        session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        fail(str(error).splitlines()[0])
    random = np.random.default_rng(int(options["-S"]))
    feed = {value.name: random.random(value.shape, np.float32) for value in session.get_inputs()}
    session.run(None, feed)
    costs = []
    for _ in range(int(options["-r"])):
        start = time.perf_counter()
        session.run(None, feed)
        costs.append(time.perf_counter() - start)
    print(f"Setting intra_op_num_threads to {options['-x']}\nAverage inference time cost: {1000 * sum(costs) / len(costs)} ms")
    with Path(results).open("a") as file:
        for run, seconds in enumerate(costs):
            file.write(f"{Path(model).resolve().parent.name},{seconds:.6g},12345678,50,{run}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
