"""One HTML page that shows what a flow has learned; `tarflow_jax.reporting` puts it together.

`samples`, `statistics` and `grids` compute or read what there is to show. `lead`, `progress`,
`sampling`, `real_images` and `scored` write the sections, out of the pieces of `markup` and
`charts`. `page` puts them in order, and `comparison` writes the page of several runs, from what
`kept` has of each.
"""
