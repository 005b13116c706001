"""What a chat model says around its answer, and in place of one, by language. Each pattern begins a sentence."""

from __future__ import annotations

import re

_AGREEING = {
    "en": (
        r"sure(?: thing)?|certainly|of course|absolutely|okay|ok|great(?: question)?|no problem"
        r"|(?:i(?:['’]d| would) be |i['’]m |i am )?(?:happy|glad) to (?:help|assist)(?: you)?(?: with (?:that|this))?"
    ),
    "zh": r"好的|当然(?:可以)?|没问题",
    "de": r"natürlich|gerne|klar",
    "fr": r"bien sûr|certainement|d'accord",
    "es": r"por supuesto|claro(?: que sí)?|desde luego",
    "pt": r"com certeza|claro",
    "it": r"certo|certamente|va bene",
    "ja": r"もちろん(?:です)?|はい|承知しました",
    "ko": r"물론(?:입니다|이죠)?",
    "ru": r"конечно|хорошо",
}
_ANNOUNCING = {
    "en": r"here(?:['’]s| is| are)|below (?:is|are)|the following (?:is|are)|this is|these are|i(?:['’]ll| will| can)",
    "zh": r"以下是|下面是|这是",
    "de": r"hier (?:ist|sind)|es folgt",
    "fr": r"voici|ci-dessous",
    "es": r"aquí (?:está|tienes?)|a continuación",
    "pt": r"aqui está|segue",
    "it": r"ecco|di seguito",
    "ja": r"以下は|以下に|こちら(?:は|が)",
    "ko": r"다음은|아래는",
    "ru": r"вот|ниже",
}
_OFFERING = {
    "en": (
        r"(?:please )?(?:let me know|feel free|do(?:n['’]t| not) hesitate)\b|i hope (?:this|that|it)\b"
        r"|if you(?:['’]d| would)?\b.{0,40}\b(?:need|have|like|want|wish)\b"
        r"|(?:what )?would you like\b|(?:what )?do you (?:need|want|have)\b|how (?:can|may) i (?:help|assist)\b"
        r"|is there anything\b|please (?:provide|share|upload|send|try)\b"
        r"|(?:please )?note(?: that|:)? (?:as an ai\b|i (?:am|can|do)\b)"
    ),
    "zh": r"(?:如果|若)(?:您|你)|希望(?:这|以上|对)|请(?:随时|告诉我|让我|提供|上传)",
    "de": r"lass(?:en sie)? (?:es )?mich\b|ich hoffe\b|(?:wenn|falls) (?:du|sie)\b",
    "fr": r"n['’]hésitez pas\b|faites-moi savoir\b|j['’]espère\b|si vous\b",
    "es": r"avísame\b|no dudes?\b|espero que\b|si (?:necesitas?|deseas?|quieres?|tienes?)\b|¿(?:necesitas?|quieres?)\b",
    "pt": r"me avise\b|se (?:você )?(?:precisar|quiser)\b",
    "it": r"fammi sapere\b|spero che\b|se (?:hai|vuoi|desideri)\b",
    "ja": r"(?:何か|他に|ほかに)*(?:ご質問|ご不明|ご要望)|お役に立て",
    "ko": r"더 (?:궁금|필요)|도움이 되",
    "ru": r"дайте (?:мне )?знать|если (?:вам|у вас|вы)\b|надеюсь\b",
}
_CANNOT = (
    r"(?:can(?:no|['’]?)t|can not|(?:am|['’]m)? ?(?:unable|not able)|won['’]?t|will not"
    r"|do(?:n['’]t| not) (?:see|have|feel)|(?:must|have to) decline)\b"
)
_REFUSING = {
    "en": (
        r"(?:i['’]?m (?:very |really |so )?sorry|i am sorry|sorry|i apologi[sz]e|my apologies|unfortunately"
        r"|regrettably)\b"
        rf"(?:,? (?:but )?|[^.!?]{{0,80}}\b(?:i|we) ?(?:['’]re )?){_CANNOT}"
        rf"|(?:as an ai\b[^.!?]{{0,60}}\b)?\bi ?{_CANNOT} (?:to )?(?:assist|help|describe|provide|view|see|watch"
        r"|analy[sz]e|process|fulfil+|comply|continue|access|discuss|engage|generate|create|answer|respond|any|an?|the|that|this"
        r"|comfortable)\b"
        r"|as an? (?:[\w-]+ ){0,2}(?:ai|language model)\b|i (?:must |have to )?decline\b"
        r"|i(?: would|['’]d) (?:rather|prefer) not\b"
        r"|(?:this|your|the) (?:content|request|prompt) (?:was |has been |is |may |might |appears to )?"
        r"(?:violates?|blocked|rejected|flagged|refused|against|not (?:allowed|permitted))\b"
        r"|(?:request|response|content) (?:was |has been )?(?:blocked|rejected|filtered|flagged)\b"
        r"|(?:[^.!?]{0,60}\b(?:appears?|seems?|looks like)\b[^.!?]{0,20}\b|[^.!?]{0,60}\bthere (?:is|are) )?"
        r"no (?:video|images?|frames?)(?: files?)? (?:(?:was|were|has been|have been) )?"
        r"(?:provided|attached|given|uploaded)\b"
    ),
    "zh": (
        r"(?:我)?(?:很|非常|十分)?(?:抱歉|对不起|不好意思|遗憾)"
        r"|(?:作为|身为).{0,20}(?:AI|人工智能)|我(?:无法|不能|没办法)"
    ),
    "de": (
        r"(?:es )?tut mir (?:sehr )?leid|entschuldigung|leider kann ich"
        r"|ich kann (?:leider|das|dies\w*|diese anfrage|ihnen|dir)\b.{0,80}\bnicht"
    ),
    "fr": r"(?:je suis )?(?:vraiment )?désolée?|je ne (?:peux|suis pas en mesure)|malheureusement,? je",
    "es": r"lo siento|no puedo\b|lamentablemente",
    "pt": r"desculpe|sinto muito|lamento|não posso\b|infelizmente,? (?:eu )?não",
    "it": r"mi dispiace|non posso\b|purtroppo non",
    "ja": (
        r"申し訳|すみません(?:が|、)|(?:誠に|大変)?恐れ入りますが"
        r"|(?:その|この)?ご?(?:依頼|要望|質問|リクエスト|内容|動画)(?:に|には|は)"
        r"(?:お応え|お答え|対応|お手伝い|説明)(?:でき(?:ません|かねます)|いたしかねます)"
    ),
    "ko": r"죄송|미안하지만",
    "ru": r"извините|простите|к сожалению,? я|я не могу",
    "uk": r"вибачте|перепрошую|на жаль,? я|я не можу",
    "pl": r"przepraszam\b|przykro mi|niestety,? nie (?:mogę|jestem)|nie mogę\b",
    "cs": r"omlouvám se|je mi líto|bohužel,? ne(?:mohu|můžu)|nemohu\b",
    "nl": r"het spijt (?:me|mij)|sorry,? (?:maar )?ik\b|helaas kan ik|ik kan (?:je|u|deze|dit|dat|hier)\b.{0,80}\bniet",
    "sv": r"tyvärr kan jag|jag kan (?:tyvärr )?inte|jag är ledsen",
    "da": r"beklager\b|desværre kan jeg|jeg kan (?:desværre |dessverre )?ikke",  # and Norwegian
    "fi": r"valitettavasti en\b|anteeksi,? mutta|en (?:voi|pysty)\b",
    "hu": r"sajnálom|sajnos nem|nem tudok (?:segíteni|ebben)",
    "ro": r"îmi pare rău|din păcate,? nu pot|nu pot (?:să|ajuta|descrie)",
    "el": r"λυπάμαι|συγγνώμη|δυστυχώς,? δεν|δεν μπορώ",
    "tr": r"üzgünüm|özür dilerim|maalesef\b",
    "ar": r"عذر[اًا]+|آسف|أعتذر|معذرة|للأسف،? لا|لا (?:أستطيع|يمكنني)",
    "he": r"מצטער|סליחה|לצערי|אני לא יכול",
    "fa": r"مت[أا]سفم|ببخشید|متأسفانه|من نمی\u200c?\s?توانم",
    "hi": r"क्षमा करें|मुझे खेद है|मुझे माफ|माफ\S* (?:कीजिए|करें)|मैं .{0,80}नहीं (?:कर )?सक",
    "bn": r"দুঃখিত|আমি দুঃখিত",
    "te": r"క్షమించండి|మన్నించండి",
    "ta": r"மன்னிக்கவும்|மன்னியுங்கள்",
    "ur": r"معذرت|معاف کیجی",
    "vi": r"(?:tôi )?(?:rất )?xin lỗi|rất tiếc|tôi không thể",
    "id": r"(?:mohon )?maaf\b|saya tidak (?:dapat|bisa)",
    "th": r"(?:ต้อง)?ขออภัย|ขอโทษ|(?:ฉัน|ผม|ดิฉัน)ไม่สามารถ",
}


def _any(*patterns: str) -> str:
    return f"(?:{'|'.join(patterns)})"


_HEADED = (  # "Description:"
    r"(?:video |image |scene )?(?:caption|description|summary|prompt)|(?:final )?answer|output|response"
    r"|(?:视频|图片|图像|画面)?(?:内容)?(?:描述|说明)|(?:動画|映像)?の?(?:説明|内容)"
    r"|(?:비디오|영상|동영상)? ?(?:설명|묘사)|описание(?: видео)?|(?:video)?beschreibung(?: des videos)?"
    r"|description de la vidéo|descripción(?: del v[ií]deo)?|descrição(?: do vídeo)?|descrizione(?: del video)?"
)
_AGREE, _ANNOUNCE = _any(*_AGREEING.values()), _any(*_ANNOUNCING.values())
_BASED = r"based (?:up)?on the (?:\w+ ){0,3}(?:frames?|images?|video|footage|pictures?)(?: \w+){0,5}, "
LEAD_IN = re.compile(  # "Sure! Here is a description of the video:"
    rf"¡?(?:(?:{_AGREE}\s*[,.!:，。！：、—-]+\s*)*{_ANNOUNCE}[^.!?。！？:：]{{0,150}}[:：]\s*"
    rf"|(?:{_HEADED})\s*[:：]\s*"
    rf"|(?:{_AGREE}(?:\s*[!！]+\s*|\s*[,.，。、]\s+))+(?:{_BASED})?|{_BASED})",
    re.IGNORECASE,
)
CLOSING = re.compile(_any(*_OFFERING.values()), re.IGNORECASE)  # "Let me know if you need more."
REFUSAL = re.compile(_any(*_REFUSING.values()), re.IGNORECASE)  # "I'm sorry, but I can't assist with that."
BUT = re.compile(r"\b(?:but|however|though|although)\b", re.IGNORECASE)  # after it comes what the model can do
ABOUT_ITSELF = re.compile(r"\b(?:i|i['’]m|me|my|you|your|please|request)\b", re.IGNORECASE)
