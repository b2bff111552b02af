"""Was built for a contract that is yet to come."""

from __future__ import annotations

from whole import Whole

backend = Whole("other_contract", contract=(7, 0))
