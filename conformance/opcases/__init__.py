"""One case per behaviour of each op: inputs, a step function, and the exact result with its bound."""
