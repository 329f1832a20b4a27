"""How a model's chat template writes tools, calls and thoughts, and how answers are read back.

Tool, ToolUse        what an answer may call                               tools.py
CallFormat           how a family of models spells a call                  call_formats.py
ChatFormat           of one model, found from its template: the prompt,
                     the grammar, the reader                               chat_format.py
answer_grammar       the grammar of an answer that may hold calls          grammar.py
AnswerReader         from text as it comes to content, thoughts and calls  answer_reader.py
"""

from gossamer.chat.answer_reader import Answer, AnswerReader, Call, Part
from gossamer.chat.chat_format import ChatFormat
from gossamer.chat.tools import Tool, ToolUse

__all__ = ["Answer", "AnswerReader", "Call", "ChatFormat", "Part", "Tool", "ToolUse"]
