"""An OpenAI-compatible HTTP server over the engine, and the pieces of it that need no HTTP.

`protocol` turns request bodies into prompts and `SamplingParams`, `replies` turns outputs into response bodies;
`engine_thread` runs the step loop beside an event loop; `app` lists the routes. Needs the extra ``serve``.
"""
