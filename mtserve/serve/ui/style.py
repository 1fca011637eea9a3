"""How the playground looks: rules for what Gradio does not draw itself."""

from __future__ import annotations

STYLE = """
.gradio-container { max-width: 1120px !important; width: 100%; margin: 0 auto !important; --quiet: #536179; }
.dark .gradio-container, .gradio-container.dark { --quiet: #a8b3c7; }
.gradio-container { --block-info-text-color: var(--quiet); --block-label-text-color: var(--quiet); }
.gradio-container main, .gradio-container .wrap.sidebar-parent, .gradio-container .contain { width: 100%; }
@media (max-width: 640px) { .gradio-container main { padding: 12px !important; } }
.cm-gutters { display: none !important; }
.top { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 16px; }
.top h1 { margin: 0; font-size: 1.6rem; }
.top p { margin: 0; color: var(--quiet); }
.out { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 14px !important; }
.out .out { border: 0; padding: 0 !important; }
.out .answer, .out .problem { padding: 4px 0; }
.quiet { color: var(--quiet); font-size: 0.9rem; margin: 6px 0 0; }
.track {
  display: block; height: 10px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden;
}
.track > span { display: block; height: 100%; border-radius: 5px; background: var(--color-accent); }
.bars { list-style: none; margin: 0; padding: 0; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 2px 12px; margin: 0 0 10px; }
.bars .name { overflow-wrap: anywhere; }
.bars .value { font-variant-numeric: tabular-nums; color: var(--quiet); }
.bars .track { grid-column: 1 / -1; }
.bars li:first-child .name { font-weight: 600; }
.bars li:not(:first-child) .track > span { opacity: 0.55; }
.score { font-size: 2.4rem; font-weight: 600; margin: 0 0 6px; font-variant-numeric: tabular-nums; }
.scale { display: grid; grid-template-columns: 1fr auto; font-size: 0.9rem; }
.scale .track { grid-column: 1 / -1; margin-bottom: 4px; }
.marked { font-size: 1.1rem; line-height: 2.3; margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.marked mark {
  color: inherit; padding: 4px 6px; border-radius: 6px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone;
}
.marked small { margin-left: 6px; font-size: 0.72rem; font-weight: 600; opacity: 0.85; white-space: nowrap; }
mark.c0 { background: #6366f140; } mark.c1 { background: #f59e0b4d; } mark.c2 { background: #10b98140; }
mark.c3 { background: #ef444440; } mark.c4 { background: #0ea5e940; } mark.c5 { background: #d946ef40; }
mark.c6 { background: #84cc1659; } mark.c7 { background: #f973164d; }
.written { font-size: 1.15rem; line-height: 1.6; margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.written i {
  display: inline-block; width: 0.5em; height: 1em; margin-left: 2px; vertical-align: text-bottom;
  background: var(--color-accent);
}
.facts { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 0; padding: 0; font-size: 0.85rem; }
.facts li { margin: 0 !important;
  padding: 2px 10px; border-radius: 12px; border: 1px solid var(--border-color-primary);
  color: var(--quiet); overflow-wrap: anywhere;
}
.answer details { margin-top: 10px; font-size: 0.85rem; }
.answer summary { cursor: pointer; color: var(--quiet); }
.answer pre {
  overflow-x: auto; max-height: 260px; padding: 8px; border-radius: 6px;
  background: var(--background-fill-secondary);
}
.problem {
  border-left: 4px solid #dc2626; padding: 8px 12px !important; background: #dc26261a; border-radius: 4px;
  overflow-wrap: anywhere;
}
.problem strong { font-family: var(--font-mono); margin-right: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 16px; }
.cards section { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 14px; min-width: 0; }
.cards h3 { margin: 0 0 10px; font-size: 1rem; }
.cards h3 small { font-weight: 400; color: var(--quiet); margin-left: 6px; }
"""
