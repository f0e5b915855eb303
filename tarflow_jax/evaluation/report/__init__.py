"""One HTML page that shows what a flow has learned; `tarflow_jax.reporting` puts it together.

`drawn` and `measured` compute what there is to show,
`charts` and `markup` make pieces of HTML, and `page` writes the sections.
"""
