"""pyllm beside other engines, on the same random weights and threads, taking turns: `pyllm bench --compare`.

Each engine lives in a process of its own (:mod:`pyllm.compare.worker`) behind the interface of
:mod:`pyllm.compare.engine`; :mod:`pyllm.compare.measure` drives them turn by turn. The other engines come with
``pip install 'pyllm[compare]'``; nothing of them is imported outside those processes.
"""
