# A study's graph. A job is an experiment with all its seeds, a trunk, or the heads that read one trunk. Started by
# `thesis-ltc study NAME`, which writes the plan that is read here, so that nothing heavy is imported to build the graph.
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
JOBS = {job["name"]: job for job in PLAN["jobs"] if not job["is_published"]}
ORDER = {name: number for number, name in enumerate(JOBS)}


for name, job in JOBS.items():  # a mark whose records were deleted marks nothing
    if not all((RUNS / file).exists() for file in job["files"]):
        (RUNS / name / "complete").unlink(missing_ok=True)


wildcard_constraints:
    job=r"[^/]+",


rule all:
    input:
        expand("{job}/complete", job=list(JOBS)),


rule job:
    input:
        lambda wildcards: [f"{name}/complete" for name in JOBS[wildcards.job]["needs"]],
    output:
        touch("{job}/complete"),
    log:
        notebook="{job}/run.ipynb",
        text="{job}/run.log",
    priority: lambda wildcards: len(ORDER) - ORDER[wildcards.job]  # started in the order of the study's file
    threads: lambda wildcards: JOBS[wildcards.job]["threads"] or workflow.cores
    resources:
        gpu=lambda wildcards: int(JOBS[wildcards.job]["device"] == "cuda"),
    params:
        python=lambda wildcards: PLAN["python"],
        values=lambda wildcards: f"{wildcards.job}/job.json",
    shell:
        "{params.python:q} -m thesis_ltc.cli run --file {params.values:q} --notebook {log.notebook:q} > {log.text:q} 2>&1"
