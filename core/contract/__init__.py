"""The waist between the engine and the hardware: the only modules of `core` that a backend may import.

| module | what it holds |
|---|---|
| `hookspecs` | every pluggy hook, the manual for backend authors |
| `interfaces` | typed Protocols of the objects that hooks return |
| `spec` | `BackendSpec`: what a backend declares, and the check that nothing else is asked of it |
| `types` | frozen records that cross the waist |
| `opspecs` | what a model tells an op besides arrays |
| `requests` | what hooks are given |
| `batch` | StepBatch and Step: one step's input on the host and on the device |
| `ops` | the op table: semantics, shapes, composites and error budget of each op |
| `derive` | pure functions from a StepBatch to every page-table form |
| `errors` | the exception tree |

`CONTRACT` is the version that this core implements. A plugin states the version it was built for in
`BackendSpec.contract`; core loads (0, n) for OLDEST_MINOR <= n <= CONTRACT[1].
"""

from __future__ import annotations

CONTRACT: tuple[int, int] = (0, 1)
OLDEST_MINOR: int = 1
