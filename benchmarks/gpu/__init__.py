"""Everything that only a GPU can tell, in one call that ends in time.

    python -m benchmarks.gpu --out DIR --budget 480

    stage            file                     what it measures
    a  machine       machine.json             card, versions, bandwidth, matrix products, time of a launch
    b  correctness   correctness.json         the tests that need a GPU; every kernel against the float64 reference
    c  images        step-cuda.json           a step of SD1.5 and SDXL: frozen floor, PEFT LoRA, ours, by launch mode
    d  language      step-cuda.json           the same of a Llama in the shape of Llama-3.2-1B
    e  run           run-cuda.json            a whole DreamBooth run, beside diffusers' script where its path is given
    f  kernels       kernels-cuda.json        each kernel and each memory-saving form against doing without
    g  pretraining   pretraining.json         more training of the embedded pipeline, with what is left of the time

Stages run in the order of their value, each in a process of its own with a time limit, and each writes its file as soon
as it knows something. A stage that fails, or is stopped, does not keep the next from running. The log ends in a short
table. `--stages bf` picks stages; `--device cpu --tiny` walks all of them on small models, to try the programs.
`benchmarks/gpu_kit.sh` gathers what a machine without network lacks.
"""
