"""LongBench's 21 tasks: our own wording of the prompts; their limits, metrics and settings."""

from __future__ import annotations

from dataclasses import dataclass

from d2o_dist.eval.metrics import longbench as metrics
from d2o_dist.eval.metrics.longbench import Metric


@dataclass(frozen=True)
class Spec:
    """One task.

    Attributes:
        before, after: around the context; `after` has `{input}` in place of the row's own input. Together with it they
            are what is asked; only `after` counts as the question.
        max_new_tokens, metric: as published.
        chat: whether the prompt may go through a chat template; few-shot and code tasks are continued as bare text.
        first_line: whether only the first line of an answer is scored.
    """

    before: str
    after: str
    max_new_tokens: int
    metric: Metric
    chat: bool = True
    first_line: bool = False


_SHORT = "Answer with as few words as possible and without any explanation."
_PASSAGES = f"Answer the question from the passages below. {_SHORT}\n\nPassages:\n"
_PASSAGES_ASK = f"\n\nAnswer the question from the passages above. {_SHORT}\n\nQuestion: {{input}}\nAnswer:"
_CODE, _CODE_ASK = "Continue this code with its next line.\n", "{input}Next line of code:\n"
_ARTICLE_ZH = "请阅读下面的文章，并用中文简短地回答问题。\n\n文章：\n"

SPECS: dict[str, Spec] = {
    "narrativeqa": Spec(
        "You will read a story, a novel or a script, and then be asked a question about it.\n\nStory: ",
        "\n\nAnswer this question about the story in one short phrase.\n\nQuestion: {input}\nAnswer:",
        128, metrics.qa_f1,
    ),
    "qasper": Spec(
        "You will read a scientific article, and then be asked a question about it.\n\nArticle: ",
        "\n\nAnswer this question from the article in one phrase or sentence. If the article does not say, answer "
        '"unanswerable". If it is a yes/no question, answer "yes", "no" or "unanswerable". Explain nothing.\n\n'
        "Question: {input}\nAnswer:",
        128, metrics.qa_f1,
    ),
    "multifieldqa_en": Spec(
        "Read the text below, and then answer a question about it.\n\n",
        "\n\nAnswer this question from the text above. " + _SHORT + "\n\nQuestion: {input}\nAnswer:",
        64, metrics.qa_f1,
    ),
    "multifieldqa_zh": Spec(
        _ARTICLE_ZH,
        "\n\n请根据上文回答下面的问题，只写答案，不要写其他内容。\n\n问题：{input}\n答案：",
        64, metrics.qa_f1_zh,
    ),
    "hotpotqa": Spec(_PASSAGES, _PASSAGES_ASK, 32, metrics.qa_f1),
    "2wikimqa": Spec(_PASSAGES, _PASSAGES_ASK, 32, metrics.qa_f1),
    "musique": Spec(_PASSAGES, _PASSAGES_ASK, 32, metrics.qa_f1),
    "dureader": Spec(_ARTICLE_ZH, "\n\n请根据以上文章回答问题。\n\n问题：{input}\n答案：", 128, metrics.rouge_l_zh),
    "gov_report": Spec(
        "Below is a report by a government agency. Summarise it on one page.\n\nReport:\n",
        "\n\nSummarise the report above on one page.{input}\n\nSummary:", 512, metrics.rouge_l,
    ),
    "qmsum": Spec(
        "Below is the transcript of a meeting, and after it a request about it.\n\nTranscript:\n",
        "\n\nAnswer the request from the transcript in one or a few sentences.\n\nRequest: {input}\nAnswer:",
        512, metrics.rouge_l,
    ),
    "multi_news": Spec(
        "Below are several news articles. Summarise all of them on one page.\n\nNews:\n",
        "\n\nSummarise the news above on one page.{input}\n\nSummary:", 512, metrics.rouge_l,
    ),
    "vcsum": Spec(
        "下面是一次会议的记录。请总结会议的内容。\n\n会议记录：\n",
        "\n\n请总结以上会议的内容。{input}\n\n会议总结：",
        512, metrics.rouge_l_zh,
    ),
    "trec": Spec(
        "Name the type of the last question, as in these examples.\n\n", "\n{input}", 64, metrics.classification,
        chat=False, first_line=True,
    ),
    "triviaqa": Spec(
        "Answer the last question from its passage with the answer alone, as in these examples.\n\n", "\n\n{input}",
        32, metrics.qa_f1, chat=False, first_line=True,
    ),
    "samsum": Spec(
        "Summarise the last dialogue in a few short sentences, as in these examples.\n\n", "\n\n{input}",
        128, metrics.rouge_l, chat=False, first_line=True,
    ),
    "lsht": Spec(
        "请参照下面的例子，判断最后一条新闻的类别。\n\n", "\n{input}", 64, metrics.classification,
        chat=False, first_line=True,
    ),
    "passage_count": Spec(
        "Below are paragraphs with their numbers, and some of them are repeated. How many different paragraphs are "
        "there?\n\n",
        "\n\nCount the different paragraphs above, each repeated one once, and write the number alone, such as 1 or 12."
        "{input}\n\nThe number of different paragraphs is:",
        32, metrics.count,
    ),
    "passage_retrieval_en": Spec(
        "Below are 30 paragraphs from an encyclopedia, and after them a summary of one of them. Find out which.\n\n",
        "\n\nThe summary:\n\n{input}\n\nName the paragraph it summarises by its number, in the form Paragraph 1, "
        "Paragraph 2 and so on.\n\nAnswer:",
        32, metrics.retrieval,
    ),
    "passage_retrieval_zh": Spec(
        "下面是若干段文字，之后是其中一段的摘要。请找出摘要对应的段落。\n\n",
        "\n\n摘要：\n\n{input}\n\n请写出该摘要对应的段落编号，格式为“段落1”、“段落2”等。\n\n答案是：",
        32, metrics.retrieval_zh,
    ),
    "lcc": Spec(_CODE, _CODE_ASK, 64, metrics.code_similarity, chat=False),
    "repobench-p": Spec(_CODE, _CODE_ASK, 64, metrics.code_similarity, chat=False),
}  # fmt: skip
