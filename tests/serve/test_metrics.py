import re
import threading

from lightlm.serve.metrics import METRICS, Metrics

SAMPLE = re.compile(r'[a-z_]+(\{[a-z_]+="(\\[\\"n]|[^"\\\n])*"(,[a-z_]+="(\\[\\"n]|[^"\\\n])*")*\})? -?[0-9.e+-]+')


def test_the_text_is_in_prometheus_format() -> None:
    metrics = Metrics()
    metrics.add("lightlm_requests_total", 1, '/a"b\\c\nd', "200")
    metrics.add("lightlm_requests_total", 2, "/", "404")
    metrics.add("lightlm_step_seconds", 0.5)
    metrics.add("lightlm_step_seconds", 0.25)
    metrics.watch("lightlm_rows", lambda: 3)
    text = metrics.write()
    assert text.endswith("\n")
    samples = [line for line in text.splitlines() if not line.startswith("# ")]
    assert all(SAMPLE.fullmatch(line) for line in samples)
    assert 'lightlm_requests_total{path="/a\\"b\\\\c\\nd",status="200"} 1' in samples
    assert "lightlm_step_seconds_sum 0.75" in samples
    assert "lightlm_step_seconds_count 2" in samples
    assert "lightlm_rows 3" in samples
    assert "lightlm_generated_tokens_total 0" in samples
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}" in text


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.add("lightlm_generated_tokens_total", 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "lightlm_generated_tokens_total 8000" in metrics.write()
