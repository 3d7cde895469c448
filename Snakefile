# A study's graph: one job an experiment, all its seeds inside. Started by `thesis-ltc study NAME`,
# which writes the plan that is read here, so that nothing heavy is imported to build the graph.
#
# Patterns are relative to the folder of the runs, which Snakemake works in: the path of a checkout may hold braces, which
# would be wildcards. What must survive a failure is no declared output: Snakemake deletes the outputs of a failed job. The runs are
# untracked, the executed notebook is a log, and the only output is a mark that every seed has its record.
import json
from pathlib import Path

(plan_file,) = config["plan"]  # a list of one, whose quotes Snakemake keeps
with open(plan_file, encoding="utf-8") as file:
    PLAN = json.load(file)
RUNS = Path(PLAN["runs"]).absolute()
CELLS = {cell["id"]: cell for cell in PLAN["cells"]}
ORDER = {identifier: number for number, identifier in enumerate(CELLS)}


def records(cell):
    return [RUNS / cell["id"] / f"seed{seed}" / "record.json" for seed in cell["seeds"]]


for cell in PLAN["cells"]:  # a mark whose records were deleted marks nothing
    if not all(record.exists() for record in records(cell)):
        (RUNS / cell["id"] / "complete").unlink(missing_ok=True)


wildcard_constraints:
    experiment=r"[^/]+",


rule all:
    input:
        expand("{experiment}/complete", experiment=list(CELLS)),


rule experiment:
    output:
        touch("{experiment}/complete"),
    log:
        notebook="{experiment}/run.ipynb",
        text="{experiment}/run.log",
    priority: lambda wildcards: len(ORDER) - ORDER[wildcards.experiment]  # started in the order of the study's file
    threads: lambda wildcards: CELLS[wildcards.experiment]["threads"] or workflow.cores
    resources:
        gpu=lambda wildcards: int(CELLS[wildcards.experiment]["device"] == "cuda"),
    params:
        python=lambda wildcards: PLAN["python"],
        values=lambda wildcards: f"{wildcards.experiment}/experiment.json",
        seeds=lambda wildcards: f"seeds={json.dumps(CELLS[wildcards.experiment]['seeds'])}",
    shell:
        "{params.python:q} -m thesis_ltc.cli run --file {params.values:q} --notebook {log.notebook:q} {params.seeds:q} > {log.text:q} 2>&1"
