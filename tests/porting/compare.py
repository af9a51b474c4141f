"""Compares a port's activations with a trace. Needs numpy alone.

    python tests/porting/compare.py trace.safetensors mine.safetensors          the last line names the first wrong block
    python tests/porting/compare.py trace.safetensors mine.safetensors --type bf16 --json

Both files hold tensors by name, as trace.py writes them; the second may hold any part of them. For every tensor:

    error       RMSE / standard deviation of the trace's tensor
    growth      error / max(errors of the tensors it is computed from, floor)
    floor       the error of one operation with exact inputs, measured for every kind of tensor and number format

A rounding error grows little in one block, whatever it has become after many; a wrong block makes an error out of
nothing. A tensor is wrong if its growth exceeds the limit of its kind. If a tensor it is computed from is not given,
its error must be below the total that its kind reaches in a correct run. The trace's metadata hold kinds, sources and
limits. The exit status is 0; 1 where a tensor is wrong; 2 after one line that says what could not be read.

A block alone, given the trace's own inputs ("teacher forcing"), in a port that need not run as a whole:

    trace = Trace("tests/porting/golden/stage_c.safetensors")
    results = teacher_force(trace, block)               # block(name, inputs) -> output, or None to skip
    print(report(results))

`inputs` is {"x": …} and, where the block reads them, "skip", "t_emb", "cond" or "mask".
"""
import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
         "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
ROWS = 20                                               # of the table


class FileError(Exception):
    """An error that the user can fix, in one line."""


class Tensors:
    """The tensors of a safetensors file by name, read when they are asked for; bf16 becomes fp32."""

    def __init__(self, path):
        try:
            self.bytes = np.memmap(path, mode="r")
            length = int(self.bytes[:8].view("<u8")[0])
            self.header = json.loads(bytes(self.bytes[8:8 + length]))
            self.metadata = self.header.pop("__metadata__", {})
            self.bytes = self.bytes[8 + length:]
            for name in self.header:                    # all of them are there, as long as the header says
                self.stored(name)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = str(error).replace("\n", " ")
            raise FileError(f"{path}: not a readable safetensors file ({reason})") from error

    def stored(self, name):
        """As it is in the file; bf16 as 16 bits."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        return self.bytes[begin:end].view(TYPES[entry["dtype"]]).reshape(entry["shape"])

    def __contains__(self, name):
        return name in self.header

    def __getitem__(self, name):
        data = self.stored(name)
        if self.header[name]["dtype"] == "BF16":        # the upper half of an fp32
            data = (data.astype("<u4") << 16).view("<f4")
        return data


class Trace(Tensors):
    """A file of trace.py or of golden/. A tensor that equals an earlier one is stored once."""

    def __init__(self, path):
        super().__init__(path)
        try:
            self.graph = json.loads(self.metadata["graph"])
            self.tolerances = json.loads(self.metadata["tolerances"])
        except (KeyError, ValueError) as error:
            raise FileError(f"{path}: not a trace, its metadata hold no graph and tolerances") from error

    def __contains__(self, name):
        return name in self.graph

    def __getitem__(self, name):
        return super().__getitem__(self.graph.get(name, {}).get("same_as", name))

    def tolerance(self, kind, number_format):
        """{"floor", "growth", "total"} of a kind of tensor."""
        tolerances = self.tolerances[number_format]
        return tolerances.get(kind, tolerances["other"])


# ------------------------------------------------------------------------------ one tensor

@dataclass
class Result:
    """How far one tensor of a port is from the trace's."""
    name: str
    kind: str
    error: float                                        # RMSE / standard deviation; of integers, the part that differs
    maximum: float                                      # largest difference / largest value
    pcc: float                                          # Pearson's correlation coefficient
    snr: float                                          # signal to noise, dB
    growth: float = 0.0
    limit: float = 0.0                                  # of the growth, or of the error if a source is not given
    incoming: float | None = None                       # largest error of the tensors that it is computed from
    note: str = ""

    @property
    def wrong(self):
        return self.growth > self.limit


def measure(name, kind, ours, theirs):
    ours, theirs = np.squeeze(ours), np.squeeze(np.asarray(theirs))
    note = ""
    if ours.shape != theirs.shape:
        note = f"expected shape {ours.shape}, got {theirs.shape}; is one channels-first?"
    elif not np.isfinite(theirs).all():
        note = "not finite"
    if note:
        return Result(name, kind, math.inf, math.inf, 0.0, -math.inf, note=note)
    if ours.dtype.kind != "f":
        part = float(np.mean(ours != theirs))
        return Result(name, kind, part, part, 1 - part, math.inf)
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    difference, centred, other = theirs - ours, ours - ours.mean(), theirs - theirs.mean()
    rmse, largest = math.sqrt(np.mean(difference ** 2)), float(np.abs(ours).max(initial=0))
    scale = float(ours.std()) or largest or 1.0
    error = rmse / scale
    product = math.sqrt(np.sum(centred ** 2) * np.sum(other ** 2))
    pcc = float(np.sum(centred * other)) / product if product else 1.0
    snr = -20 * math.log10(error) if error else math.inf
    maximum = float(np.abs(difference).max(initial=0)) / (largest or 1.0)
    return Result(name, kind, error, maximum, pcc, snr)


# ------------------------------------------------------------------------------ many tensors

def error_into(trace, name, errors):
    """The largest error of the tensors that `name` is computed from, times its gain; None where one is not known."""
    found = []
    for source, gain in trace.graph[name]["sources"].items():
        if source in errors:
            error = errors[source]
        elif source in trace and trace.graph[source]["kind"] == "input":
            error = error_into(trace, source, errors)   # the input of a block is the output of another one
        else:
            return None
        if error is None:
            return None
        found.append(gain * error)
    return max(found, default=None)


def judge(result, incoming, tolerance):
    """Sets the growth of a result and its limit."""
    result.incoming = incoming
    floor = tolerance["floor"]
    if result.kind == "integers":
        result.growth, result.limit = result.error, 0.0
    elif incoming is None:
        result.growth, result.limit = result.error / floor, tolerance["total"] / floor
    else:
        result.growth = result.error / max(incoming, floor) if math.isfinite(incoming) else 1.0
        result.limit = tolerance["growth"]


def compare(trace, other, number_format="fp32"):
    """Results, in the order of execution, of the tensors that both files hold."""
    results, errors = [], {}
    for name, entry in trace.graph.items():
        if name in other:
            result = measure(name, entry["kind"], trace[name], other[name])
            errors[name] = result.error
            incoming = error_into(trace, name, errors)
            judge(result, incoming, trace.tolerance(entry["kind"], number_format))
            results.append(result)
    return results


def teacher_force(trace, block, number_format="fp32"):
    """Results of the blocks for which `block(name, inputs)` returns an output."""
    results = []
    for name, entry in trace.graph.items():
        sources = entry.get("inputs", {})
        inputs = {key: trace[source] for key, source in sources.items() if source in trace}
        output = block(name.removesuffix(".out"), inputs) if inputs else None
        if output is not None:
            result = measure(name, entry["kind"], trace[name], output)
            judge(result, 0.0, trace.tolerance(entry["kind"], number_format))
            results.append(result)
    return results


def first_wrong(results):
    return next((result for result in results if result.wrong), None)


# ------------------------------------------------------------------------------ the report

def summary(names):
    """Names that differ in their numbers only, as one pattern with a count."""
    patterns = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{pattern} ({count})" for pattern, count in patterns.items())


def report(results):
    """The tensors with the largest growth, and on the last line the first wrong one."""
    lines = [f"{'growth':>8} {'limit':>8} {'error':>8} {'max':>8} {'SNR dB':>6} {'PCC':>11}  tensor"]
    for r in sorted(results, key=lambda r: r.growth, reverse=True)[:ROWS]:
        lines.append(f"{r.growth:8.3g} {r.limit:8.3g} {r.error:8.1e} {r.maximum:8.1e} "
                     f"{r.snr:6.1f} {r.pcc:11.8f}  {r.name} ({r.kind})")
    wrong = first_wrong(results)
    if wrong is None:
        lines.append(f"all agree: largest error {max(r.error for r in results):.1e}")
    else:
        note = f"; {wrong.note}" * bool(wrong.note)
        lines.append(f"first wrong block: {wrong.name} ({wrong.kind}): error {wrong.error:.1e}, "
                     f"growth {wrong.growth:.3g}, limit {wrong.limit:.3g}{note}")
    return "\n".join(lines)


def without_infinity(values):
    """JSON has no infinity: null."""
    infinite = (math.inf, -math.inf)
    return {key: None if value in infinite else value for key, value in values.items()}


def run(options):
    trace, other = Trace(options.trace), Tensors(options.other)
    results = compare(trace, other, options.type)
    if not results:
        first = next(iter(trace.graph))
        raise FileError(f"{options.other}: holds none of the trace's names, such as {first}")
    missing = [name for name in trace.graph if name not in other]
    unknown = [name for name in other.header if name not in trace]
    wrong = first_wrong(results)
    if options.json:
        tensors = [without_infinity(asdict(result)) for result in results]
        name = wrong.name if wrong else None
        found = {"first_wrong": name, "missing": missing, "unknown": unknown, "tensors": tensors}
        print(json.dumps(found))
    else:
        count = f"{len(results)} of {len(trace.graph)} tensors compared"
        print(f"{count}, {len(unknown)} unknown to the trace")
        for title, names in (("missing", missing), ("unknown", unknown)):
            if names:
                print(f"{title}: {summary(names)}")
        print(report(results))
    return int(wrong is not None)


class Parser(argparse.ArgumentParser):
    def __init__(self, text):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise FileError(message)


def exit_status(program, command, *expected_errors):
    """Runs a command -> its exit status (none is 0), or 2 after one line about an expected error.
    A closed pipe, as of `head`, is no error."""
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except (FileError, *expected_errors) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(arguments=None):
    parser = Parser(__doc__)
    parser.add_argument("trace")
    parser.add_argument("other")
    parser.add_argument("--type", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the port")
    parser.add_argument("--json", action="store_true", help="all results, as one JSON object")
    return exit_status("compare.py", lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
