"""The benchmark for a GPU at hand; `python -m bench.gpu_suite` runs it.

Index: `device` the machine that is measured, `cases` what is measured, `data` inputs, `contender` one thing to time,
`fine`, `attention`, `parts`, `model`, `overlap`, `memory` the contenders of each kind of case, `oracle` and `gate` what
stands before a number, `timing` interleaved samples, `checks` the tests and the sanitizer, `tuning` which configuration is
best, `runner` from cases to rows, `supervise` a process that may crash or hang, `rows` the files, `plots` the figures,
`targets` what the numbers are held against.
"""
