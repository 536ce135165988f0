"""``shoal worker doctor``: looks at everything a worker rests on, and says how to mend it.

`report` is what was found, `examination` runs the checks side by side under deadlines, and
each other module looks at one part of the world: `machine`, `compute`, `keys`, `reach`,
`line` and `chain`.  What is measured and what is made of it are kept apart: the functions
that judge are pure.
"""
