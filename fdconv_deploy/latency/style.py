"""The look of a report's page: light, dark or printed, wide or narrow."""

STYLE = """
:root { --back: #fff; --text: #1f2328; --faint: #59636e; --line: #d1d9e0;
  --c0: #2f6fb3; --c1: #d9822b; --c2: #3a9a5b; --c3: #b8467c; --c4: #7a6cc4; --c5: #8a8f98;
  --c6: #b59b1d; --c7: #2a9ba8; }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --text: #e4e8ee; --faint: #9aa4b1;
  --line: #333c48; --c0: #5b9be0; --c1: #eb9a4a; --c2: #58bd7d; --c3: #dd6fa2; --c4: #9f92e8;
  --c5: #9aa2ad; --c6: #d4b93c; --c7: #4cc0cd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p, main > ul { color: var(--faint); margin: .2rem 0 .8rem; }
main > ul { padding-left: 1.2rem; }
.plot { display: block; overflow: visible; }
.plot text { fill: var(--text); font-size: 12px; }
.plot .faint { fill: var(--faint); }
.plot .small { fill: var(--faint); font-size: 11px; }
.plot .grid { stroke: var(--line); }
.plot .whisker { stroke: var(--text); opacity: .7; }
.plot line[class^=c] { stroke-width: 2; }
.c0 { fill: var(--c0); stroke: var(--c0); } .c1 { fill: var(--c1); stroke: var(--c1); }
.c2 { fill: var(--c2); stroke: var(--c2); } .c3 { fill: var(--c3); stroke: var(--c3); }
.c4 { fill: var(--c4); stroke: var(--c4); } .c5 { fill: var(--c5); stroke: var(--c5); }
.c6 { fill: var(--c6); stroke: var(--c6); } .c7 { fill: var(--c7); stroke: var(--c7); }
rect { stroke: none !important; }
.legend { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap;
  gap: .2rem 1.2rem; font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: 13px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
@media (min-width: 40rem) { td:first-child { min-width: 14rem; } }
@media print { :root { --back: #fff; --text: #000; --faint: #444; --line: #bbb; }
  main { max-width: none; padding: 0; } .wide { overflow: visible; } table { font-size: 9px; }
  th, td { padding: .15rem .3rem; } section { break-inside: avoid-page; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
