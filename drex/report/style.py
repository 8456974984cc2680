"""What drawings look like, on light pages and dark ones: colours as CSS variables, and the classes that `charts` names.

For pages that hold drawings, and for drawings that are files of their own. Nothing is fetched, fonts included.
"""

COLOURS = """
:root{color-scheme:light dark;--page:#fff;--soft:#f4f6f8;--ink:#14181f;--quiet:#566070;--grid:#e2e6eb;
--warn-page:#fff3cf;--warn:#9a6200;--shallow:#b3d8f2;--deep:#0b4a80;--own:#c3c9d1;
--c0:#0067b1;--c1:#4d5561;--c2:#c65408;--c3:#00795b;--c4:#a3448a;--c5:#5d4a00;--c6:#187fa8;--c7:#c22a3a}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--soft:#181d24;--ink:#e8ecf1;--quiet:#9aa5b4;--grid:#2a313b;
--warn-page:#2e240a;--warn:#f0bf4c;--shallow:#9ccbee;--deep:#2270b5;--own:#8b95a3;
--c0:#5cb1ff;--c1:#ccd2da;--c2:#f0823c;--c3:#35c79a;--c4:#ea80cc;--c5:#f0d25a;--c6:#45d3e8;--c7:#ff7d80}}
"""
FONT = '-apple-system,"Segoe UI",Inter,Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif'
DRAWING = """
text{font-size:12.5px;fill:var(--quiet);font-variant-numeric:tabular-nums}
text.label,text.note{font-weight:600;fill:var(--ink)}
text.main{font-weight:700}text.reference{font-style:italic;font-weight:400}text.note{font-weight:400}
text.on-deep{fill:#fff}text.on-shallow{fill:#0d1b29}.grid{stroke:var(--grid)}.stroke{fill:none;stroke-width:1.8}
.main{stroke-width:3.2}.reference{stroke-dasharray:6 4;stroke-width:1.4}
.context{stroke-width:1.2;opacity:.3}.dots{stroke-width:1;opacity:.35}.whisker{stroke-width:4;opacity:.5}
.far{fill:none;stroke-width:1.2;opacity:.7}.leader{fill:none;stroke-width:1;opacity:.45}
.mark,.piece{stroke:var(--page);stroke-width:1}
.halo,text.label{paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}text.halo{fill:var(--ink)}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.06}
"""
