"""What nvcc makes of the pair losses' kernels for sm_90a, read from the binary: no GPU is needed.

Instructions per score are those of the interior loop, which a warp runs for tiles that have all their rows and columns
and no positive. It is found in the control flow: the only loop with loads of 16 bytes, eight of them, four scores each.
Every instruction of the loop counts, whether or not all lanes execute it: loads, shuffles and index arithmetic, and
basic blocks that the compiler has moved out of line but that lead back into the loop. Code outside the loop, for tiles
with positives or a ragged edge, does not count.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc" / "pairs"
KERNEL = re.compile(r"\d(stats|gradient|sigmoid)_kernelI(6__half|13__nv_bfloat16|f|v)?Lb1E")
TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "v": "none", None: "float32"}
GRADIENTS = ["float32", "bfloat16", "float16"]
WIDE = [("stats", "float32"), *(("gradient", t) for t in GRADIENTS), *(("sigmoid", t) for t in [*GRADIENTS, "none"])]
MOST = {"stats": 24, "gradient": 24, "sigmoid": 32}  # instructions a score
REGISTERS = {"stats": 128, "gradient": 128, "sigmoid": 102}  # for 4, 4 and 5 thread blocks of 128 on a multiprocessor


class Code:
    """A function's instructions, as nvdisasm -c writes them, and where control goes from each."""

    def __init__(self, text: str):
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L\w+):", line):
                labels[label[1]] = len(self.instructions)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
                self.instructions.append(instruction[1])
        self.next: list[list[int]] = []
        for i, instruction in enumerate(self.instructions):
            guard, op = re.match(r"(@!?U?P\w+\s+)?(.*)", instruction).groups()
            target = re.match(r"(?:BRA|JMP)\S*\s+(.*)`\((\.L\w+)\)", op)
            goes_on = bool(guard) or not re.match(r"BRA|JMP|BRX|EXIT|RET", op) or bool(target and target[1])
            there = [labels[target[2]]] if target else []
            self.next.append(([i + 1] if goes_on and i + 1 < len(self.instructions) else []) + there)

    def loops(self) -> list[list[int]]:
        """The natural loops: for each branch to an instruction that dominates it, the instructions in between."""
        before: list[list[int]] = [[] for _ in self.instructions]
        for i, following in enumerate(self.next):
            for j in following:
                before[j].append(i)
        found = []
        for i, following in enumerate(self.next):
            for head in following:
                if head <= i and (head == 0 or i not in reached(0, self.next, head)):
                    found.append(sorted(reached(i, before, head) | {head}))
        return found

    def interior(self) -> list[str]:
        """The instructions of the only loop with loads of 16 bytes."""
        loops = [[self.instructions[i] for i in body] for body in self.loops()]
        hot = [body for body in loops if any("LDG.E.128" in instruction for instruction in body)]
        assert len(hot) == 1, [len(body) for body in hot]
        return hot[0]


def reached(start: int, edges: list[list[int]], avoiding: int) -> set[int]:
    seen, left = {avoiding}, [start]
    while left:
        if (i := left.pop()) not in seen:
            seen.add(i)
            left.extend(edges[i])
    return seen - {avoiding}


def of(op: str, instructions: list[str]) -> list[str]:
    return [instruction for instruction in instructions if re.match(rf"(@!?U?P\w+\s+)?{op}\b", instruction)]


def disassembler() -> str:
    if found := shutil.which("nvdisasm"):
        return found
    nvidia = pytest.importorskip("triton.backends.nvidia")  # its wheel contains one
    return str(Path(nvidia.__file__).parent / "bin" / "nvdisasm")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """(kernel, dtype of its gradient) -> (Code, registers, bytes spilled), of those with accesses of 16 bytes."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    nvdisasm, found = disassembler(), {}
    for name in ("contrastive", "sigmoid"):
        cubin = tmp_path_factory.mktemp("sass") / f"{name}.cubin"
        command = [
            nvcc,
            "-O3",
            "-std=c++17",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-cubin",
            "-Xptxas=-v",
            f"-I{CSRC.parent}",
        ]
        done = subprocess.run([*command, "-o", cubin, CSRC / f"{name}.cu"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        report = done.stdout + done.stderr
        sass = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
        for part in re.split(r"\n\.text\.", sass)[1:]:
            symbol = part.split(":", 1)[0]
            if not (kernel := KERNEL.search(symbol)):
                continue
            used = re.search(
                rf"Compiling entry function '{re.escape(symbol)}'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
                r".*?Used (\d+) registers",
                report,
                re.S,
            )
            spilled = int(used[1]) + int(used[2])
            found[kernel[1], TYPES[kernel[2]]] = Code(part), int(used[3]), spilled
    return found


def test_loops_are_found_with_what_lies_out_of_line():
    code = Code(
        """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   BSSY B0, `(.L_x_4) ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_4:
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   BRA.DIV UR9, `(.L_x_5) ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*0090*/                   BRA `(.L_x_5);
"""
    )
    # A loop with three instructions out of line, their way back, and the endless loop at the end.
    assert [1, 2, 3, 4, 6, 7, 8] in code.loops() and [9] in code.loops()
    assert len(code.interior()) == 7 and len(of("LDG", code.interior())) == 1
    assert code.next[4] == [5, 1] and code.next[5] == [] and code.next[6] == [7, 9] and code.next[8] == [3]


def test_every_kernel_is_there(kernels):
    assert sorted(kernels) == sorted(WIDE)


@pytest.mark.parametrize(("name", "dtype"), WIDE)
def test_instructions_a_score(kernels, name, dtype):
    code, registers, spilled = kernels[name, dtype]
    loop = code.interior()
    loads = of(r"LDG\.E\.128", loop)
    assert len(loads) == len(of("LDG", loop)) == 8
    assert not of(r"(CALL|BAR)", loop)
    per_score = len(loop) / (4 * len(loads))
    print(f"{name:8} {dtype:8} {per_score:.1f} instructions a score, {registers} registers")
    assert per_score <= MOST[name]
    assert registers <= REGISTERS[name] and not spilled and not of("(LDL|STL)", code.instructions)
    # As stated in the file's header; other versions of nvcc may differ a little.
    assert abs(per_score - stated(name, dtype)) <= 1


@pytest.mark.parametrize(("name", "dtype"), WIDE)
def test_stores_are_wide(kernels, name, dtype):
    code = kernels[name, dtype][0]
    width = {"float32": r"STG\.E\.128", "bfloat16": r"STG\.E\.64", "float16": r"STG\.E\.64"}.get(dtype)
    expected = 0 if name == "stats" or width is None else 8
    stores = of("STG", code.interior())
    assert len(stores) == expected and (not expected or of(width, stores) == stores)


def stated(name: str, dtype: str) -> float:
    """Instructions a score, as the head of the kernel's file gives them."""
    file = CSRC / ("sigmoid.cu" if name == "sigmoid" else "contrastive.cu")
    head = file.read_text().split('#include "pairs.cuh"')[0]
    text = " ".join(line.removeprefix("//").strip() for line in head.splitlines())
    if name == "sigmoid":
        pattern = r"Instructions a score: ([\d.]+) \(float32: ([\d.]+); ([\d.]+) where no gradient"
        half, single, none = re.search(pattern, text).groups()
        return float({"float32": single, "none": none}.get(dtype, half))
    stats, half, single = re.search(r"Instructions a score: ([\d.]+) and ([\d.]+) \(float32: ([\d.]+)\)", text).groups()
    return float(stats if name == "stats" else single if dtype == "float32" else half)
