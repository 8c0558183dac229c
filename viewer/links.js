// Show HTML whose links and copy buttons work without loading the app again: a plain click on a link sends its
// href to Python, and [data-copy] is copied. Ctrl-click and the middle button open a link in a new tab.
export default function ({ parentElement, data, setTriggerValue }) {
  const root = parentElement.querySelector('.links')
  if (root.shown !== data) { // else keep where it is scrolled to, and how it is sorted
    root.innerHTML = root.shown = data
    sortTables(root)
  }
  root.onclick = async (event) => {
    const copy = event.target.closest('[data-copy]')
    if (copy) {
      const text = copy.textContent
      copy.textContent = (await copyText(copy.dataset.copy)) ? 'copied' : 'not allowed'
      setTimeout(() => (copy.textContent = text), 1500)
    }
    const link = event.target.closest('a[href]')
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return
    event.preventDefault()
    setTriggerValue('clicked', link.getAttribute('href'))
  }
}

async function copyText(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false)
  }
  const area = document.createElement('textarea') // not on localhost and without HTTPS
  area.value = text
  document.body.append(area)
  area.select()
  const done = document.execCommand('copy')
  area.remove()
  return done
}
